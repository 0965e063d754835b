"""benchmarks/sglang_serving.py without a server: what it compares, and the weights it makes up."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import sglang_server
import torch
from sglang_server import Answer, reserve_port

import torch_moe_ops as moe

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def serving() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "sglang_serving.py"), run_name="sglang_serving"))


def answer(*tokens: int, margin: float = 1.0, logprob: float = -1.0) -> Answer:
    return Answer(list(tokens), [logprob] * len(tokens), [margin] * len(tokens))


def test_answers_are_compared_up_to_their_first_difference(serving) -> None:
    theirs = [answer(1, 2, 3, 4), answer(1, 2, 3, 4, margin=0.1), answer(5, 6, 7, 8), answer(9, 9, 9, 9)]
    ours = [answer(1, 2, 3, 4, logprob=-1.5), answer(1, 2, 9, 9), answer(5, 0, 7, 8), answer(0, 9, 9, 9)]
    assert serving.compare(ours, theirs, tie=0.3) == {
        "answers": 4,
        "identical": 1,
        "tokens_before_first_difference": (4 + 2 + 1 + 0) / 16,
        "differences_beyond_a_near_tie": 2,
        "largest_margin_overturned": 1.0,
        "first_logprob_median_difference": 0.0,
        "first_logprob_largest_difference": 0.5,
    }


def test_prompts_are_the_same_every_time_and_of_the_lengths_asked_for(serving) -> None:
    prompts = serving.make_prompts(50, (1, 9), seed=3)
    assert prompts == serving.make_prompts(50, (1, 9), seed=3) != serving.make_prompts(50, (1, 9), seed=4)
    assert {len(prompt) for prompt in prompts} == set(range(1, 10))
    assert all(len(prompt) == 7 for prompt in serving.make_prompts(3, 7, seed=0))


@pytest.mark.skipif(not RANGE.exists(), reason="only Linux says which ports it hands out")
def test_a_servers_port_is_none_that_the_system_hands_out() -> None:
    """Among those, a connection of the server's own ranks once had it before the server listened there."""
    low, high = map(int, RANGE.read_text().split())
    for _ in range(100):
        port, reservation = reserve_port()
        reservation.close()
        assert not low <= port <= high


def test_a_reserved_port_is_nobody_elses(monkeypatch) -> None:
    port, reservation = reserve_port()
    monkeypatch.setattr(sglang_server, "PORTS", range(port, port + 1))
    with pytest.raises(RuntimeError, match=f"each of the ports {port} to {port} is taken"):
        reserve_port()
    reservation.close()
    again, reservation = reserve_port()
    reservation.close()
    assert again == port


class FakeServer:
    """Takes 1 ms for a prompt and 2 ms for each further token of all."""

    def __init__(self) -> None:
        self.now = 0.0

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[dict]:
        self.now += 1e-3 * len(prompts) + 2e-3 * (new_tokens - 1)
        return [{"output_ids": [0] * new_tokens}] * len(prompts)


def test_speeds_are_those_of_a_server_with_known_times(serving, monkeypatch) -> None:
    server = FakeServer()
    monkeypatch.setattr(serving.time, "monotonic", lambda: server.now)
    args = SimpleNamespace(input=5, output=11, repeat=3, warmup=1)
    point = serving.measure(server, 4, args)
    assert point["ttft_s"] == pytest.approx(4e-3)
    assert point["output_tokens_per_s"] == pytest.approx(4 * 11 / 24e-3)
    assert point["decode_tokens_per_s"] == pytest.approx(4 * 10 / 20e-3)
    assert point["spread"] == pytest.approx(0)


F8, U8 = torch.float8_e4m3fn, torch.uint8
MADE_UP = {  # scale's name, dtype of the values, their number in a byte, dtype of the scale, its blocks
    "fp8_block": ("weight_scale_inv", F8, 1, torch.float32, (128, 128)),
    "int8": ("weight_scale", torch.int8, 1, torch.float32, (1, None)),
    "mxfp4": ("weight_scale", U8, 2, U8, (1, 32)),
    "nvfp4": ("weight_scale", U8, 2, F8, (1, 16)),
}


@pytest.mark.parametrize("format", MADE_UP)
def test_made_up_weights_keep_sizes_and_spread_tokens_over_the_experts(format) -> None:
    initialize = runpy.run_path(str(BENCHMARKS / "sglang_dummy/sglang_dummy.py"))["initialize"]
    experts, hidden_size, width, tokens = 32, 256, 128, 512
    scale_name, dtype, pack, scale_dtype, (rows, columns) = MADE_UP[format]
    model = torch.nn.Module()
    for name in ("gate", "experts"):
        model.add_module(name, torch.nn.Module())

    def make(module: torch.nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))

    make(model.gate, "weight", (experts, hidden_size))
    make(model.gate, "e_score_correction_bias", (experts,))
    for name, n, k in (("w13", 2 * width, hidden_size), ("w2", hidden_size, width)):
        make(model.experts, f"{name}_weight", (experts, n, k // pack), dtype)
        make(model.experts, f"{name}_{scale_name}", (experts, n // rows, k // (columns or k)), scale_dtype)
        if format == "nvfp4":
            make(model.experts, f"{name}_weight_scale_2", (experts, 2) if name == "w13" else (experts,))
            make(model.experts, f"{name}_input_scale", (experts,))
    initialize(model)
    x = torch.randn(tokens, hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = x.float() @ model.gate.weight.T
    weights, ids = moe.topk(logits, 4, scoring="sigmoid", correction_bias=model.gate.e_score_correction_bias.float())
    assert ids.flatten().bincount(minlength=experts).min() > tokens * 4 / experts / 4  # no expert idles
    w13, w2 = model.experts.w13_weight, model.experts.w2_weight
    options = {f"{name}_scale": getattr(model.experts, f"{name}_{scale_name}") for name in ("w13", "w2")}
    if format == "nvfp4":
        options |= {f"{name}_global_scale": getattr(model.experts, f"{name}_weight_scale_2") for name in ("w13", "w2")}
        options |= {f"a{n}_global_scale": getattr(model.experts, f"w{n}_input_scale").max() for n in ("13", "2")}
    output = moe.fused_moe(x, w13, w2, weights, ids, format=format, **options)
    assert 0.05 < output.float().std() < 2
