"""The stages of a layer, each timed alone on what the stages before it gave:

topk; sort_slots -> permute -> grouped_gemm_w13 -> act_mul -> grouped_gemm_w2 -> finalize

topk runs on random logits of its own, grouped if the model's is: the routing of a benchmark is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ...backends import CANDIDATES, explain
from ...experts import Experts
from ...packed_weights import is_packed
from .. import _layer
from .measure import Point, error_of, facts_of, make_all_inputs, routing_counts, time_calls

GEMMS = ("grouped_gemm_w13", "grouped_gemm_w2")
# Results of the stages for one input, by the name of the argument that a later stage takes.
State = dict[str, Tensor]


def stages(
    case: _layer.Case, experts: Experts, op_of: Callable[[str], Callable]
) -> dict[str, tuple[str, Callable[[State], State]]]:
    """name -> (op, stage), where stage takes the results so far and returns its own."""
    e, act_format = experts, experts.act_format or experts.format
    gemm = dict(format=e.format, act_format=e.act_format)
    groups = dict(scoring="sigmoid", num_groups=case.num_groups, topk_groups=case.topk_groups)

    def topk(s: State) -> State:
        options = {} if case.num_groups == 1 else {"correction_bias": s["correction_bias"], **groups}
        topk_weights, topk_ids = op_of("topk")(s["router_logits"], s["topk_ids"].shape[1], **options)
        return {"chosen_weights": topk_weights, "chosen_ids": topk_ids}

    def sort_slots(s: State) -> State:
        offsets, slot_to_row, _ = op_of("sort_slots")(s["topk_ids"], e.num_experts)
        return {"expert_offsets": offsets, "slot_to_row": slot_to_row}

    def permute(s: State) -> State:
        num_rows = s["topk_ids"].numel()
        values, scale = op_of("permute")(s["hidden_states"], s["slot_to_row"], num_rows, format=act_format)
        return {"permuted": values, "permuted_scale": scale}

    def grouped_gemm_w13(s: State) -> State:
        weight = dict(b_scale=e.w13_scale, b_global_scale=e.w13_global_scale, b_parts=2)
        a_scale = s["permuted_scale"]
        out = op_of("grouped_gemm")(s["permuted"], e.w13, s["expert_offsets"], a_scale=a_scale, **weight, **gemm)
        return {"gate_up": out}

    def act_mul(s: State) -> State:
        values, scale = op_of("act_mul")(s["gate_up"], s["expert_offsets"], format=act_format)
        return {"act": values, "act_scale": scale}

    def grouped_gemm_w2(s: State) -> State:
        weight = dict(b_scale=e.w2_scale, b_global_scale=e.w2_global_scale)
        out = op_of("grouped_gemm")(s["act"], e.w2, s["expert_offsets"], a_scale=s["act_scale"], **weight, **gemm)
        return {"expert_out": out}

    def finalize(s: State) -> State:
        return {"output": op_of("finalize")(s["expert_out"], s["slot_to_row"], topk_weights=s["topk_weights"])}

    order = (topk, sort_slots, permute, grouped_gemm_w13, act_mul, grouped_gemm_w2, finalize)
    return {stage.__name__: ("grouped_gemm" if stage.__name__ in GEMMS else stage.__name__, stage) for stage in order}


def measure_stages(
    case: _layer.Case,
    experts: Experts,
    num_tokens: int,
    backend: str | None = None,
    routing: str = "uniform",
    timed: Collection[str] | None = None,
) -> list[Point]:
    """One point per stage, or per stage of `timed`, the others running once; `err` is that of the whole chain."""
    inputs = make_all_inputs(case, experts, num_tokens, routing)
    names = ("hidden_states", "topk_weights", "topk_ids")
    states: list[State] = [dict(zip(names, tensors, strict=True)) for tensors in inputs]
    for state in states:
        state["router_logits"] = torch.randn(num_tokens, case.num_router_experts, device=state["topk_ids"].device)
        state["correction_bias"] = torch.randn(case.num_router_experts, device=state["topk_ids"].device)
    hit, slots = routing_counts(inputs)
    measured: list[tuple[str, str | None, float, float, float, float]] = []
    for name, (op, stage) in stages(case, experts, lambda op: overload(op, backend)).items():
        if timed is None or name in timed:
            us, us_min, results = time_calls(stage, [(state,) for state in states])
            tbps = stage_bytes(name, experts, states[0], results[0], hit, slots) / us / 1e6
            tflops = 2 * slots * weight_of(name, experts) / us / 1e6
            measured.append((name, chosen_backend(op, name, case, experts, backend), us, us_min, tbps, tflops))
        else:
            results = [stage(state) for state in states]
        for state, result in zip(states, results, strict=True):
            state.update(result)
    err = error_of(experts, inputs[0], states[0]["output"])
    return [
        Point(
            **facts_of(name, case, experts, num_tokens, routing),
            backend=chosen,
            us=us,
            us_min=us_min,
            tbps=tbps,
            tflops=tflops,
            err=err,
            ok=err <= _layer.tolerance(experts),
            experts_hit=hit,
            slots=slots,
        )
        for name, chosen, us, us_min, tbps, tflops in measured
    ]


def overload(op: str, backend: str | None) -> Callable:
    """A forced backend holds for the stage ops that have it."""
    return getattr(getattr(torch.ops.moe, op), backend if backend in CANDIDATES[op] else "default")


def chosen_backend(op: str, name: str, case: _layer.Case, experts: Experts, backend: str | None) -> str | None:
    if backend in CANDIDATES[op]:
        return backend
    hidden, intermediate = case.hidden_size, case.intermediate_size
    n, k = (2 * intermediate, hidden) if name == "grouped_gemm_w13" else (hidden, intermediate)
    formats = dict(format=experts.format, act_format=experts.act_format, packed=is_packed(experts.w13))
    facts = dict(n=n, k=k, b_parts=2 if name == "grouped_gemm_w13" else 1, **formats) if op == "grouped_gemm" else {}
    return explain(op, device=experts.w13.device, **facts).backend


def weight_of(name: str, experts: Experts) -> int:
    """N * K of the stage's GEMM, 0 for the other stages."""
    hidden, intermediate = experts.hidden_size, experts.intermediate_size
    return {"grouped_gemm_w13": 2 * intermediate * hidden, "grouped_gemm_w2": hidden * intermediate}.get(name, 0)


def stage_bytes(name: str, experts: Experts, state: State, result: State, hit: float, slots: float) -> float:
    """A GEMM: the weights of the experts hit. Other stages: what they read and write, of the rows in use."""
    if name.startswith("grouped_gemm"):
        weight = name.removeprefix("grouped_gemm_")
        tensors = [getattr(experts, weight), getattr(experts, f"{weight}_scale")]
        return hit * sum(tensor[0].numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    reads = {
        "topk": ("router_logits",),
        "sort_slots": ("topk_ids",),
        "permute": ("hidden_states", "slot_to_row"),
        "act_mul": ("gate_up",),
        "finalize": ("expert_out", "slot_to_row", "topk_weights"),
    }
    tensors = [state[argument] for argument in reads[name]] + list(result.values())
    num_rows = state["topk_ids"].numel()
    used = slots / num_rows
    row_matrices = ("permuted", "permuted_scale", "gate_up", "act", "act_scale", "expert_out")
    matrices = [state.get(argument, result.get(argument)) for argument in row_matrices]
    return sum(
        tensor.numel() * tensor.element_size() * (used if any(tensor is matrix for matrix in matrices) else 1)
        for tensor in tensors
    )
