"""finalize: the weighted sum in the order of k, and what absent and wrong slots give."""

from __future__ import annotations

import pytest
import torch

import torch_moe_ops as moe

T, K, H = 6, 3, 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [True, False])
def test_against_a_loop(dtype: torch.dtype, weighted: bool) -> None:
    torch.manual_seed(0)
    expert_out = torch.randn(T * K, H).to(dtype)
    slot_to_row = torch.randperm(T * K).view(T, K).int()
    slot_to_row[1, 0] = slot_to_row[4] = -1
    weights = torch.rand(T, K) if weighted else None
    got = moe.finalize(expert_out, slot_to_row, topk_weights=weights, routed_scaling_factor=2.5)
    expected = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for k, row in enumerate(slot_to_row[t].tolist()):
            if row >= 0:
                expected[t] += (weights[t, k].double() if weighted else 1.0) * expert_out[row].double()
    out_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    assert got.dtype == out_dtype and got.is_contiguous()
    rtol = 2**-8 if out_dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(got.double(), expected * 2.5, rtol=rtol, atol=1e-5)
    assert not got[4].any()


def test_s2_15_the_order_of_k() -> None:
    """In float32 1e8 + 1 - 1e8 is 0, 1e8 - 1e8 + 1 is 1."""
    expert_out = torch.tensor([[1e8], [1.0], [-1e8]])
    rows = torch.tensor([[0, 1, 2], [0, 2, 1]]).int()
    assert moe.finalize(expert_out, rows).flatten().tolist() == [0.0, 1.0]


def test_absent_slots_are_skipped_whatever_they_hold() -> None:
    expert_out = torch.full((2, H), float("nan"))
    expert_out[0] = 1.0
    weights = torch.tensor([[2.0, float("nan")]])
    out = moe.finalize(expert_out, torch.tensor([[0, -1]]).int(), topk_weights=weights)
    assert (out == 2.0).all()


@pytest.mark.parametrize("row", [-2, -3, 2, 5])
def test_what_is_no_row_gives_nan(row: int) -> None:
    """-2: an id that is out of range."""
    out = moe.finalize(torch.ones(2, H), torch.tensor([[0, row], [1, -1]]).int())
    assert out[0].isnan().all() and (out[1] == 1.0).all()


def test_no_tokens() -> None:
    assert moe.finalize(torch.empty(0, H), torch.empty(0, K, dtype=torch.int32)).shape == (0, H)
    assert moe.finalize(torch.empty(0, H), torch.full((2, K), -1, dtype=torch.int32)).eq(0).all()
