"""topk_ids [T, K] -> expert_offsets int32 [E + 1], slot_to_row int32 [T, K], row_to_slot int32 [P]."""

from __future__ import annotations

from torch import Tensor

from ._check import INT32, expect_range, expect_sizes
from ._sizes import max_rows

MOST_ALIGNMENT = 1 << 20


def check(topk_ids: Tensor, num_experts: int, *, expert_map: Tensor | None = None, alignment: int = 1) -> None:
    expect_sizes("sort_slots", "topk_ids", topk_ids, INT32, ("T", "K"))
    expect_range("sort_slots", "num_experts", num_experts, 1)
    if expert_map is not None:
        expect_sizes("sort_slots", "expert_map", expert_map, INT32, ("Eg",), topk_ids.device)
    expect_range("sort_slots", "alignment", alignment, 1, MOST_ALIGNMENT)


def fake(
    topk_ids: Tensor, num_experts: int, *, expert_map: Tensor | None = None, alignment: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    check(topk_ids, num_experts, expert_map=expert_map, alignment=alignment)
    num_tokens, top_k = topk_ids.shape
    num_rows = max_rows(num_tokens * top_k, num_experts, alignment)
    return (
        topk_ids.new_empty((num_experts + 1,)),
        topk_ids.new_empty((num_tokens, top_k)),
        topk_ids.new_empty((num_rows,)),
    )
