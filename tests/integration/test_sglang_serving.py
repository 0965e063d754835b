"""benchmarks/sglang_serving.py without a server: what it compares, and the weights it makes up."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang_server import Answer

import torch_moe_ops as moe

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


def test_made_up_weights_keep_sizes_and_spread_tokens_over_the_experts() -> None:
    initialize = runpy.run_path(str(BENCHMARKS / "sglang_dummy/sglang_dummy.py"))["initialize"]
    experts, hidden_size, width, tokens = 32, 256, 128, 512
    model = torch.nn.Module()
    shapes = {
        "norm.weight": (hidden_size,),
        "gate.weight": (experts, hidden_size),
        "gate.e_score_correction_bias": (experts,),
        "experts.w13_weight": (experts, 2 * width, hidden_size),
        "experts.w13_weight_scale_inv": (experts, 2, 2),
        "experts.w2_weight": (experts, hidden_size, width),
        "experts.w2_weight_scale_inv": (experts, 2, 1),
    }
    for name, shape in shapes.items():
        *parents, leaf = name.split(".")
        module = model
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        dtype = torch.float8_e4m3fn if leaf in ("w13_weight", "w2_weight") else torch.float32
        module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
    initialize(model)
    x = torch.randn(tokens, hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = x.float() @ model.gate.weight.T
    weights, ids = moe.topk(logits, 4, scoring="sigmoid", correction_bias=model.gate.e_score_correction_bias.float())
    assert ids.flatten().bincount(minlength=experts).min() > tokens * 4 / experts / 4  # no expert idles
    w13, w2 = model.experts.w13_weight, model.experts.w2_weight
    scales = {"w13_scale": model.experts.w13_weight_scale_inv, "w2_scale": model.experts.w2_weight_scale_inv}
    output = moe.fused_moe(x, w13, w2, weights, ids, format="fp8_block", **scales)
    assert 0.05 < output.float().std() < 2
