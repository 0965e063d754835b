"""Sorts slots by expert: topk_ids [T, K] -> expert_offsets [E + 1], slot_to_row [T, K], row_to_slot [P]."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = """(Tensor topk_ids, int num_experts, *, Tensor? expert_map=None, int alignment=1)
-> (Tensor expert_offsets, Tensor slot_to_row, Tensor row_to_slot)"""


def facts(topk_ids: Tensor, num_experts: int, **_: object) -> dict[str, object]:
    return {"num_experts": num_experts, "top_k": topk_ids.shape[1]}


def sort_slots(
    topk_ids: Tensor, num_experts: int, *, expert_map: Tensor | None = None, alignment: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Gives every slot a row, so that the rows of an expert lie together.

        slot = token * K + k;  expert = expert_map[topk_ids[slot]], or topk_ids[slot] without a map;  -1 = not here
        expert_offsets[e] = first row of expert e, a multiple of alignment;  expert_offsets[E] = rows in use
        slot_to_row[slot_in_order_of(expert, slot)] = expert_offsets[expert] + 0, 1, 2, ...
        row_to_slot[slot_to_row[slot]] = slot

    Args:
        topk_ids: int32 [T, K], contiguous; -1 for an absent slot.
        num_experts: E, the experts that live here.
        expert_map: int32 [Eg], from the router's ids to 0 ... E - 1 or -1. Expert parallelism enters here alone.
        alignment: each expert starts at a multiple of this many rows.

    Returns:
        expert_offsets int32 [E + 1]; slot_to_row int32 [T, K], -1 for absent slots; row_to_slot int32 [P], -1 for
        padding rows and rows past the end. P = max_rows(T * K, E, alignment), T * K for alignment 1.

    Raises:
        RuntimeError: ``sort_slots: argument: expected ..., got ...``. An id out of range raises on a CPU; on a GPU,
            where that would take a synchronisation, its slot_to_row is -2 and `finalize` makes the token's output NaN.

    Source: MegaBlocks, arXiv:2211.15841, for rows in the order of experts, none of them dropped.
    """
    return torch.ops.moe.sort_slots.default(topk_ids, num_experts, expert_map=expert_map, alignment=alignment)
