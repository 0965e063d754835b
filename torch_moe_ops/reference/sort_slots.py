"""Sorts slots by expert: topk_ids [T, K] -> expert_offsets [E + 1], slot_to_row [T, K], row_to_slot [P]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..meta_kernels._sizes import max_rows
from ._values import expect_ids

ABSENT = -1
OUT_OF_RANGE = -2


def sort_slots(
    topk_ids: Tensor, num_experts: int, *, expert_map: Tensor | None = None, alignment: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    expert = _local_experts(topk_ids.flatten().long(), num_experts, expert_map)  # [S], -1 absent, -2 out of range
    here = expert >= 0
    key = torch.where(here, expert, num_experts)  # absent slots sort behind the last expert
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=key.device).scatter_add_(
        0, key, torch.ones_like(key)
    )
    padded = (counts[:-1] + alignment - 1) // alignment * alignment
    offsets = torch.nn.functional.pad(padded.cumsum(0), (1, 0))  # [E + 1]

    order = key.argsort(stable=True)  # slots by expert, in slot order within each
    first = counts.cumsum(0) - counts  # where each expert's slots start in `order`
    sorted_key = key[order]
    rank = torch.arange(len(order), device=key.device) - first[sorted_key]
    row = torch.empty_like(order).scatter_(0, order, offsets[sorted_key] + rank)  # [S]
    slot_to_row = torch.where(here, row, expert)

    num_rows = max_rows(len(order), num_experts, alignment)
    row_to_slot = torch.full((num_rows + 1,), ABSENT, device=key.device)  # one more element takes the absent slots
    row_to_slot.scatter_(0, torch.where(here, row, num_rows), torch.arange(len(order), device=key.device))
    return offsets.int(), slot_to_row.view(topk_ids.shape).int(), row_to_slot[:-1].int()


def _local_experts(ids: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:
    """Ids of the router -> ids of the experts here. Out of range: an error on a CPU, else -2."""
    num_ids = num_experts if expert_map is None else len(expert_map)
    expect_ids("sort_slots", "topk_ids", ids, num_ids)
    bad = (ids < ABSENT) | (ids >= num_ids)
    if expert_map is not None:
        expect_ids("sort_slots", "expert_map", expert_map, num_experts)
        # An appended -1 answers for absent slots, so the map is never indexed out of bounds.
        extended = torch.nn.functional.pad(expert_map.long(), (0, 1), value=ABSENT)
        ids = extended[torch.where(bad | (ids < 0), num_ids, ids)]
        bad = bad | (ids < ABSENT) | (ids >= num_experts)
    return torch.where(bad, OUT_OF_RANGE, ids)
