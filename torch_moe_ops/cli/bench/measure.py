"""Points: how long fused_moe and its stages take, against the time that the hardware needs at least.

    floor = max(bytes of the weights of the experts hit / read bandwidth, 6 * slots * H * I / matrix rate)

slots counts those with a local expert; activation traffic is not in the floor. The rates are the best ones *measured*
on that GPU (a 4 GiB read, 8192^3 GEMMs), not those of a data sheet.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...backends import explain
from ...experts import Experts
from ...formats import FORMATS
from ...packed_weights import is_packed
from .. import _layer

# From so many tokens on -> calls in one graph, each with its own input and routing.
GRAPH_CALLS = {1: 8, 8: 8, 32: 4, 128: 4, 512: 2, 2048: 2, 8192: 1}
REPLAY_MS = 40.0
# A graph that takes less is captured again with its calls repeated: the host replays none faster than in 10 to 20 us.
GRAPH_MS = 0.1
# GPU -> (TB/s read, TFLOP/s by bits of an activation), measured.
MEASURED_RATES = {"NVIDIA H200": (4.6, {16: 812.0, 8: 1463.0})}

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Point:
    """One measurement. `tbps` counts the weights of the experts hit; for a stage without weights, all it moves."""

    what: str  # fused_moe, host_call, or a stage such as grouped_gemm_w13
    case: str
    format: str
    act_format: str
    tokens: int
    routing: str
    backend: str | None
    us: float | None = None  # median
    us_min: float | None = None
    tbps: float | None = None
    tflops: float | None = None
    floor_us: float | None = None  # only of fused_moe; None for for GPUs without measured rates
    err: float | None = None
    ok: bool = False
    experts_hit: float | None = None
    slots: float | None = None
    error: str | None = None

    HEADER: ClassVar[str] = (
        f"{'case':<13}{'format':<10}{'tokens':>7}  {'routing':<9}{'what':<17}{'us':>10}{'TB/s':>8}{'TFLOP/s':>9}"
        f"{'% floor':>9}{'error':>10}  backend"
    )

    def __str__(self) -> str:
        start = f"{self.case:<13}{self.format:<10}{self.tokens:>7}  {self.routing:<9}{self.what:<17}"
        if self.us is None:
            return f"{start}failed: {self.error}"
        percent = 100 * self.floor_us / self.us if self.floor_us else None
        columns = ((self.us, 10, 1), (self.tbps, 8, 3), (self.tflops, 9, 1), (percent, 9, 1), (self.err, 10, 5))
        numbers = ("-".rjust(width) if x is None else f"{x:>{width}.{digits}f}" for x, width, digits in columns)
        return f"{start}{''.join(numbers)}  {self.backend}{'' if self.ok else '  WRONG'}"

    def record(self) -> dict[str, object]:
        """For JSON: no NaN (null), numbers rounded to what the clock resolves."""
        digits = {"us": 2, "us_min": 2, "tbps": 4, "tflops": 2, "floor_us": 2, "err": 6}
        record = asdict(self)
        for name, value in record.items():
            if isinstance(value, float):
                record[name] = round(value, digits.get(name, 2)) if math.isfinite(value) else None
        return record


def facts_of(what: str, case: _layer.Case, experts: Experts, num_tokens: int, routing: str) -> dict[str, object]:
    """What was measured, as the first fields of a Point."""
    formats = dict(format=experts.format, act_format=experts.act_format)
    return dict(what=what, case=case.name, **formats, tokens=num_tokens, routing=routing)


def make_all_inputs(case: _layer.Case, experts: Experts, num_tokens: int, routing: str) -> list[Inputs]:
    generator = torch.Generator(device=experts.w13.device).manual_seed(100 + num_tokens)
    calls = next((calls for tokens, calls in reversed(GRAPH_CALLS.items()) if tokens <= num_tokens), 8)
    dtype = _layer.input_dtype(experts)
    return [_layer.make_inputs(case, num_tokens, generator, index, dtype, routing) for index in range(calls)]


def measure_fused_moe(
    case: _layer.Case, experts: Experts, num_tokens: int, backend: str | None = None, routing: str = "uniform"
) -> Point:
    """One point; a failure becomes a point with `error`."""
    facts = facts_of("fused_moe", case, experts, num_tokens, routing)
    try:
        chosen = backend or chosen_backend(case, experts)
        inputs = make_all_inputs(case, experts, num_tokens, routing)
        us, us_min, outputs = time_calls(fused_moe_call(experts, backend), inputs)
        err = max(error_of(experts, inputs[i], outputs[i]) for i in {0, len(inputs) - 1})
    except Exception as error:  # compilers raise what they like; the point says it and counts as failed
        return Point(**facts, backend=backend, error=one_line(error))
    hit, slots = routing_counts(inputs)
    weight_bytes = hit * expert_bytes(experts)
    flops = 6 * slots * case.hidden_size * case.intermediate_size
    return Point(
        **facts,
        backend=chosen,
        us=us,
        us_min=us_min,
        tbps=weight_bytes / us / 1e6,
        tflops=flops / us / 1e6,
        floor_us=floor_us(weight_bytes, flops, experts),
        err=err,
        ok=err <= _layer.tolerance(experts),
        experts_hit=hit,
        slots=slots,
    )


def fused_moe_call(experts: Experts, backend: str | None) -> Callable[..., Tensor]:
    """call(hidden_states, topk_weights, topk_ids) -> output"""
    op, options = getattr(torch.ops.moe.fused_moe, backend or "default"), experts.options()

    def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return op(hidden_states, experts.w13, experts.w2, topk_weights, topk_ids, **options)

    return call


def chosen_backend(case: _layer.Case, experts: Experts) -> str | None:
    """What moe::fused_moe's default runs on this device."""
    return explain(
        "fused_moe",
        device=experts.w13.device,
        format=experts.format,
        act_format=experts.act_format,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_experts=case.num_experts,
        top_k=case.top_k,
        packed=is_packed(experts.w13),
    ).backend


def error_of(experts: Experts, inputs: Inputs, output: Tensor) -> float:
    """NaN sorts above every number here, so that max() keeps it."""
    rows, expected = _layer.reference(experts, inputs)
    err = _layer.relative_error(output[rows], expected)
    return math.inf if math.isnan(err) else err


def routing_counts(inputs: Sequence[Inputs]) -> tuple[float, float]:
    """(experts hit, slots with a local expert), averaged over the calls of a graph."""
    local = [topk_ids[topk_ids >= 0] for _, _, topk_ids in inputs]
    return statistics.mean(ids.unique().numel() for ids in local), statistics.mean(ids.numel() for ids in local)


def expert_bytes(experts: Experts) -> int:
    """Weights and scales of one expert."""
    tensors = (experts.w13, experts.w2, experts.w13_scale, experts.w2_scale)
    return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def floor_us(weight_bytes: float, flops: float, experts: Experts) -> float | None:
    if experts.w13.device.type != "cuda":
        return None
    rates = MEASURED_RATES.get(torch.cuda.get_device_name())
    if rates is None:
        return None
    tbps, tflops = rates
    bits = min(16, 8 * FORMATS[experts.act_format or experts.format].dtype.itemsize)
    return max(weight_bytes / tbps / 1e6, flops / tflops[bits] / 1e6)


def time_calls(
    call: Callable[..., object], inputs: Sequence[Sequence[object]], replay_ms: float = REPLAY_MS
) -> tuple[float, float, list]:
    """call(*inputs[i]) for each i -> (median us of a call, the fastest, the outputs of the last replay)."""
    if not torch.cuda.is_available():
        return _time_on_cpu(call, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, allocates and loads modules outside the capture
        for _ in range(2):
            for arguments in inputs:
                call(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return _time_graph(call, inputs, replay_ms)


def _time_graph(
    call: Callable[..., object], inputs: Sequence[Sequence[object]], replay_ms: float
) -> tuple[float, float, list]:
    graph, outputs = _capture(call, inputs, 1)
    first_ms, rounds = _replay_ms(graph, 3)[-1], 1
    if first_ms < GRAPH_MS:
        rounds = math.ceil(GRAPH_MS / max(first_ms, 1e-3))
        graph, outputs = _capture(call, inputs, rounds)
        first_ms = _replay_ms(graph, 3)[-1]
    count = int(min(40, max(5, replay_ms / max(first_ms, 1e-3))))
    us = [1e3 * ms / (rounds * len(inputs)) for ms in _replay_ms(graph, count)]
    return statistics.median(us), min(us), outputs


def _capture(
    call: Callable[..., object], inputs: Sequence[Sequence[object]], rounds: int
) -> tuple[torch.cuda.CUDAGraph, list]:
    """A graph of all calls, `rounds` times, and the outputs of the last round."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            outputs = [call(*arguments) for arguments in inputs]
    return graph, outputs


def _replay_ms(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _time_on_cpu(call: Callable[..., object], inputs: Sequence[Sequence[object]]) -> tuple[float, float, list]:
    us = []
    for _ in range(3):
        start = time.perf_counter()
        outputs = [call(*arguments) for arguments in inputs]
        us.append(1e6 * (time.perf_counter() - start) / len(inputs))
    return statistics.median(us), min(us), outputs


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
