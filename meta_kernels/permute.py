"""hidden_states [T, H] -> permuted [num_rows, H/pack], permuted_scale [num_rows, columns] (fp8_block: MN-major)."""

from __future__ import annotations

from torch import Tensor

from ..formats import get_format
from ._check import BF16_FP16, FLOAT32, INT32, expect_offsets, expect_range, expect_sizes, expect_tensor
from ._sizes import empty_act_scale, empty_values
from .quantize import check_global_scale, check_pack, check_unquantised


def check(
    hidden_states: Tensor,
    slot_to_row: Tensor,
    num_rows: int,
    *,
    format: str = "bf16",
    global_scale: Tensor | None = None,
    expert_offsets: Tensor | None = None,
    topk_weights: Tensor | None = None,
) -> None:
    fmt = get_format("permute", format)
    num_tokens, hidden_size = expect_sizes("permute", "hidden_states", hidden_states, BF16_FP16, ("T", "H"))
    device = hidden_states.device
    top_k = expect_sizes("permute", "slot_to_row", slot_to_row, INT32, ("T", "K"), device)[1]
    expect_tensor("permute", "slot_to_row", slot_to_row, INT32, (num_tokens, top_k), device)
    expect_range("permute", "num_rows", num_rows, 0)
    check_unquantised("permute", "format", fmt, hidden_states.dtype)
    check_pack("permute", "hidden_states", fmt, hidden_states, hidden_size)
    num_experts = None
    if expert_offsets is not None:
        num_experts = expect_offsets("permute", expert_offsets, device)
    check_global_scale("permute", "global_scale", fmt, global_scale, num_experts, device)
    if topk_weights is not None:
        expect_tensor("permute", "topk_weights", topk_weights, FLOAT32, (num_tokens, top_k), device)


def fake(
    hidden_states: Tensor, slot_to_row: Tensor, num_rows: int, *, format: str = "bf16", **options: object
) -> tuple[Tensor, Tensor]:
    check(hidden_states, slot_to_row, num_rows, format=format, **options)
    fmt, hidden_size, device = get_format("permute", format), hidden_states.shape[1], hidden_states.device
    return empty_values(fmt, num_rows, hidden_size, device), empty_act_scale(fmt, num_rows, hidden_size, device)
