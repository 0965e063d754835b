"""permuted[slot_to_row[t, k]] = quantize(hidden_states[t]): [T, H] -> [num_rows, H/pack]."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = """(Tensor hidden_states, Tensor slot_to_row, SymInt num_rows, *, str format="bf16", Tensor? global_scale=None,
Tensor? expert_offsets=None, Tensor? topk_weights=None) -> (Tensor permuted, Tensor permuted_scale)"""


def facts(hidden_states: Tensor, slot_to_row: Tensor, num_rows: int, *, format: str = "bf16", **_: object) -> dict:
    return {"format": format, "top_k": slot_to_row.shape[1]}


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
    """Copies each token to the rows of its slots, quantised.

        permuted[r], permuted_scale[r] = quantize(hidden_states[t] [* topk_weights[t, k]]),  r = slot_to_row[t, k] >= 0

    Args:
        hidden_states: bfloat16 or float16 [T, H], contiguous.
        slot_to_row: int32 [T, K], from `sort_slots`.
        num_rows: P, the length of `sort_slots`' row_to_slot.
        format: bf16 or fp16 (the dtype of hidden_states) or a quantised format.
        global_scale: float32, one element or, with `expert_offsets`, [E]; nvfp4 only.
        expert_offsets: int32 [E + 1], needed for a global scale per expert only.
        topk_weights: float32 [T, K], multiplied in before quantising (models that weigh the input; K = 1).

    Returns:
        permuted [num_rows, H/pack] and permuted_scale [num_rows, scale columns]. The scale of fp8_block is MN-major:
        strides (1, round_up(num_rows, 4)); all others are contiguous. Rows that no slot maps to are unspecified.

    Raises:
        RuntimeError: ``permute: argument: expected ..., got ...``

    Sources: those of `sort_slots` and `quantize`.
    """
    return torch.ops.moe.permute.default(
        hidden_states,
        slot_to_row,
        num_rows,
        format=format,
        global_scale=global_scale,
        expert_offsets=expert_offsets,
        topk_weights=topk_weights,
    )
