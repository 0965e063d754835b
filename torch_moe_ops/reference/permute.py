"""permuted[slot_to_row[t, k]] = quantize(hidden_states[t]): [T, H] -> [num_rows, H/pack]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import get_format
from ._values import expect_offset_values
from .quantize import global_scale_of_rows, lay_out_scale, quantize_rows


def permute(
    hidden_states: Tensor,
    slot_to_row: Tensor,
    num_rows: int,
    *,
    format: str = "bf16",
    global_scale: Tensor | None = None,
    expert_offsets: Tensor | None = None,
    topk_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    fmt = get_format("permute", format)
    top_k, slots = slot_to_row.shape[1], slot_to_row.flatten().long()
    tokens = torch.arange(len(slots), device=slots.device) // max(top_k, 1)
    copies = hidden_states[tokens]  # [S, H]
    if topk_weights is not None:
        copies = copies.float() * topk_weights.reshape(-1, 1)
    rows = copies.new_zeros((num_rows + 1, hidden_states.shape[1]))  # one more row takes the absent slots
    rows.index_copy_(0, torch.where((slots >= 0) & (slots < num_rows), slots, num_rows), copies)
    if expert_offsets is not None:
        expect_offset_values("permute", expert_offsets, num_rows)
    rows = rows[:num_rows]  # rows that no slot maps to are zero here, but unspecified to callers
    values, scale = quantize_rows(fmt, rows, global_scale_of_rows(global_scale, expert_offsets, num_rows))
    return values, lay_out_scale(fmt, scale)
