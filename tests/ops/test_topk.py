"""topk against plain Python: scores in float64, one sort key per expert."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import torch_moe_ops as moe


def slow_topk(
    logits: list[float],
    top_k: int,
    scoring: str = "softmax",
    bias: list[float] | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    factor: float = 1.0,
) -> tuple[list[float], list[int]]:
    experts = range(len(logits))
    valid = [x for x in logits if not math.isnan(x)]
    peak = max(valid, default=0.0)
    total = sum(math.exp(x - peak) for x in valid)

    def score(x: float) -> float:
        if math.isnan(x):
            return 0.0
        return 1 / (1 + math.exp(-x)) if scoring == "sigmoid" else math.exp(x - peak) / total

    scores = [score(x) for x in logits]
    choice = [-math.inf if math.isnan(logits[e]) else scores[e] + (bias[e] if bias else 0.0) for e in experts]
    size = len(logits) // num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
    group_score = [sum(sorted((choice[e] for e in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(num_groups), key=lambda g: (-group_score[g], g))[:topk_groups]
    ids = sorted((e for g in best for e in groups[g]), key=lambda e: (-choice[e], e))[:top_k]
    weights = [scores[e] for e in ids]
    if renormalize:
        weights = [w / (sum(weights) + 1e-20) for w in weights]
    return [w * factor for w in weights], ids


def compare(logits: Tensor, top_k: int, bias: Tensor | None = None, **options: object) -> None:
    got_weights, got_ids = moe.topk(logits, top_k, correction_bias=bias, **options)
    slow = {"factor" if name == "routed_scaling_factor" else name: value for name, value in options.items()}
    expected = [slow_topk(row, top_k, bias=None if bias is None else bias.tolist(), **slow) for row in logits.tolist()]
    assert got_ids.tolist() == [ids for _, ids in expected]
    # exp, the sum over Eg and the division each round to float32: a few units in the last place.
    torch.testing.assert_close(got_weights, torch.tensor([weights for weights, _ in expected]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_python(scoring: str, renormalize: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Multiples of 1/16 in a small range: many exact ties, and scores that differ do so by far more than rounding.
    logits = (torch.randint(-40, 40, (50, 64)) / 16).to(dtype)
    compare(logits, 6, scoring=scoring, renormalize=renormalize, routed_scaling_factor=2.5)


@pytest.mark.parametrize(
    ("num_groups", "topk_groups", "top_k"), [(8, 4, 8), (8, 1, 3), (32, 5, 10), (64, 9, 9), (2, 2, 64)]
)
def test_groups(num_groups: int, topk_groups: int, top_k: int) -> None:
    torch.manual_seed(1)
    bias = torch.randn(64) * 0.1
    logits = torch.randn(40, 64)
    compare(logits, top_k, bias, scoring="sigmoid", num_groups=num_groups, topk_groups=topk_groups)


def test_ties_go_to_the_lower_id_and_group() -> None:
    weights, ids = moe.topk(torch.zeros(3, 16), 4, num_groups=4, topk_groups=2)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(weights, torch.full((3, 4), 0.25))


def test_ties_of_many_groups() -> None:
    """torch's unstable sort keeps the order of up to 16."""
    for num_groups in (4, 32):
        _, ids = moe.topk(torch.zeros(3, 2 * num_groups), 4, num_groups=num_groups, topk_groups=2)
        assert ids.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_experts", [5, 8, 60])
def test_a_token_depends_on_itself_alone(scoring: str, num_experts: int) -> None:
    """Also in the last values of the tensor, which torch takes one by one."""
    logits = torch.randn(101, num_experts)
    together, _ = moe.topk(logits, 2, scoring=scoring, renormalize=False)
    alone = [moe.topk(row[None], 2, scoring=scoring, renormalize=False)[0] for row in logits]
    assert torch.equal(torch.cat(alone), together)


def test_nan_ranks_last_and_weighs_nothing() -> None:
    nan = float("nan")
    logits = torch.tensor([[nan, 1.0, nan, 0.5], [nan, nan, nan, 2.0], [nan] * 4, [-float("inf")] * 4])
    for scoring in ("softmax", "sigmoid"):
        compare(logits[:3], 3, scoring=scoring)
        weights, ids = moe.topk(logits, 3, scoring=scoring)
        assert weights.isfinite().all()
        assert ids.tolist() == [[1, 3, 0], [3, 0, 1], [0, 1, 2], [0, 1, 2]]
    # A group of NaN is the worst group; inside a chosen group NaN still beats any expert outside.
    logits = torch.tensor([[nan, nan, 1.0, nan, 0.0, 0.0]])
    compare(logits, 2, num_groups=3, topk_groups=1)


def test_the_bias_selects_but_does_not_weigh() -> None:
    weights, ids = moe.topk(
        torch.tensor([[0.0, 1.0]]), 1, correction_bias=torch.tensor([5.0, 0.0]), scoring="sigmoid", renormalize=False
    )
    assert ids.tolist() == [[0]] and weights.tolist() == [[0.5]]


def test_dtypes_and_no_tokens() -> None:
    weights, ids = moe.topk(torch.empty(0, 8), 2)
    assert (weights.shape, weights.dtype) == ((0, 2), torch.float32)
    assert (ids.shape, ids.dtype) == ((0, 2), torch.int32)


def test_a_bias_that_is_nan_ranks_last() -> None:
    bias = torch.tensor([0.0, 0.0, float("nan"), 0.0])
    ids = moe.topk(torch.tensor([[3.0, 2.0, 9.0, 0.0]]), 2, scoring="sigmoid", correction_bias=bias)[1]
    assert ids.tolist() == [[0, 1]]
