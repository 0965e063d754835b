"""permute: every row that a slot maps to is that token, quantised by itself."""

from __future__ import annotations

import pytest
import torch

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS

T, K, H = 7, 3, 160


def routing(alignment: int = 1) -> tuple[torch.Tensor, torch.Tensor, int]:
    ids = torch.tensor([[0, 2, -1], [2, 1, 0], [-1, -1, -1], [2, 0, 1], [0, 1, 2], [2, -1, 0], [2, 1, 0]]).int()
    offsets, slot_to_row, row_to_slot = moe.sort_slots(ids, 4, alignment=alignment)
    return offsets, slot_to_row, len(row_to_slot)


def hidden(format: str) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(T, H).to(torch.float16 if format == "fp16" else torch.bfloat16)


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_what_is_no_row_is_left_out() -> None:
    permuted, _ = moe.permute(hidden("bf16")[:2], torch.tensor([[0, 2, -1], [1, 9, -2]]).int(), 2)
    assert torch.equal(permuted, hidden("bf16")[:2])


@pytest.mark.parametrize("alignment", [1, 4])
def test_rows_are_quantised_tokens(format: str, alignment: int) -> None:
    x = hidden(format)
    _, slot_to_row, num_rows = routing(alignment)
    permuted, scale = moe.permute(x, slot_to_row, num_rows, format=format)
    values, token_scale = moe.quantize(x, format)
    assert len(permuted) == len(scale) == num_rows
    for token in range(T):
        for row in slot_to_row[token].tolist():
            if row >= 0:
                assert equal_bits(permuted[row], values[token])
                assert equal_bits(scale[row], token_scale[token])


def test_layout_of_the_scale(format: str) -> None:
    _, slot_to_row, num_rows = routing()
    permuted, scale = moe.permute(hidden(format), slot_to_row, num_rows + 2, format=format)
    columns = FORMATS[format].act_scale_shape(1, H)[1]
    assert permuted.is_contiguous() and scale.shape == (num_rows + 2, columns)
    mn_major = (1, -(-(num_rows + 2) // 4) * 4)
    assert scale.stride() == (mn_major if format == "fp8_block" else (max(columns, 1), 1))


def test_weights_are_applied_before_quantising(format: str) -> None:
    x = hidden(format)
    _, slot_to_row, num_rows = routing()
    weights = torch.rand(T, K)
    permuted, scale = moe.permute(x, slot_to_row, num_rows, format=format, topk_weights=weights)
    for token in range(T):
        for k, row in enumerate(slot_to_row[token].tolist()):
            if row >= 0:
                values, one_scale = moe.quantize(x[token : token + 1].float() * weights[token, k], format)
                assert equal_bits(permuted[row], values[0])
                assert equal_bits(scale[row], one_scale[0])


def test_global_scale_per_expert() -> None:
    x = hidden("nvfp4")
    offsets, slot_to_row, num_rows = routing(alignment=2)
    global_scale = torch.tensor([0.001, 0.02, 0.3, 1.0])
    permuted, scale = moe.permute(
        x, slot_to_row, num_rows, format="nvfp4", global_scale=global_scale, expert_offsets=offsets
    )
    for token in range(T):
        for row in slot_to_row[token].tolist():
            if row >= 0:
                expert = int((offsets[1:] <= row).sum())
                values, one_scale = moe.quantize(
                    x[token : token + 1], "nvfp4", global_scale=global_scale[expert].reshape(1)
                )
                assert equal_bits(permuted[row], values[0])
                assert equal_bits(scale[row], one_scale[0])


def test_no_tokens(format: str) -> None:
    x = hidden(format)[:0]
    permuted, scale = moe.permute(x, torch.empty(0, K, dtype=torch.int32), 0, format=format)
    assert len(permuted) == len(scale) == 0


def test_offsets_of_no_expert_are_refused() -> None:
    offsets = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(
        RuntimeError, match=r"^permute: expert_offsets: expected int32 \[E \+ 1\] of at least one expert"
    ):
        moe.permute(hidden("nvfp4")[:1], torch.tensor([[0]]).int(), 1, format="nvfp4", expert_offsets=offsets)
