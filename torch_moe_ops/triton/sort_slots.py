"""Counting sort of slots by expert, stable: slot_to_row[t, k], its inverse row_to_slot [P], and expert_offsets [E + 1].

    slot_to_row[slot] = expert_offsets[e] + number of earlier slots of the same expert e
    expert_offsets[e + 1] = expert_offsets[e] + round_up(slots of e, alignment)
topk_ids int32 [T, K]; -1 stays -1, an id or map entry out of range becomes -2. Three launches, no atomics, nothing read
by the host: count each expert in each block of slots, scan the counts of each expert over the blocks, place every slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_moe_ops.meta_kernels._sizes import max_rows
from torch_moe_ops.triton._common import on_device

# Elements of the [BLOCK, EXPERTS] one-hot tile: 64 registers a thread at 8 warps.
TILE_ELEMENTS = 16384
MAX_BLOCK = 256
# Arguments that change from batch to batch: a kernel compiled for one value must serve all.
BATCH_SIZES = ["num_slots", "num_blocks"]


@triton.jit
def _local_experts(topk_ids_ptr, expert_map_ptr, slots, num_slots, num_experts, map_size):
    """Local expert of each slot; -1 is not here, -2 is out of range."""
    ids = tl.load(topk_ids_ptr + slots, mask=slots < num_slots, other=-1)
    if expert_map_ptr is not None:
        in_map = (ids >= 0) & (ids < map_size)
        mapped = tl.load(expert_map_ptr + ids, mask=in_map, other=-1)
        ids = tl.where(in_map, mapped, tl.where(ids == -1, -1, -2))
    in_range = (ids >= -1) & (ids < num_experts)
    return tl.where(in_range, ids, -2)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _count_kernel(
    topk_ids_ptr, expert_map_ptr, counts_ptr, num_slots, num_experts, map_size, num_blocks,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slots, e = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    local = _local_experts(topk_ids_ptr, expert_map_ptr, slots, num_slots, num_experts, map_size)
    counts = tl.sum((local[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + e.to(tl.int64) * num_blocks + block, counts, mask=e < num_experts)


@triton.jit(do_not_specialize=["num_blocks"])
def _scan_kernel(counts_ptr, totals_ptr, num_blocks, NUM_BLOCKS: tl.constexpr):
    """Counts of one expert -> the same expert's slots in earlier blocks, and their total."""
    expert, block = tl.program_id(0), tl.arange(0, NUM_BLOCKS)
    counts_ptrs = counts_ptr + expert.to(tl.int64) * num_blocks + block
    counts = tl.load(counts_ptrs, mask=block < num_blocks, other=0)
    tl.store(counts_ptrs, tl.cumsum(counts, axis=0) - counts, mask=block < num_blocks)
    tl.store(totals_ptr + expert, tl.sum(counts, axis=0))


@triton.jit(do_not_specialize=BATCH_SIZES)
def _place_kernel(
    topk_ids_ptr, expert_map_ptr, counts_ptr, totals_ptr, expert_offsets_ptr, slot_to_row_ptr, row_to_slot_ptr,
    num_slots, num_experts, map_size, num_blocks, alignment, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slots, e = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    padded = tl.cdiv(tl.load(totals_ptr + e, mask=e < num_experts, other=0), alignment) * alignment
    end = tl.cumsum(padded, axis=0)
    if block == 0:
        tl.store(expert_offsets_ptr, 0)
        tl.store(expert_offsets_ptr + 1 + e, end, mask=e < num_experts)
    earlier = tl.load(counts_ptr + e.to(tl.int64) * num_blocks + block, mask=e < num_experts, other=0)
    local = _local_experts(topk_ids_ptr, expert_map_ptr, slots, num_slots, num_experts, map_size)
    is_expert = (local[:, None] == e[None, :]).to(tl.int32)
    rank = tl.cumsum(is_expert, axis=0) - 1
    row = tl.sum(is_expert * ((end - padded + earlier)[None, :] + rank), axis=1)
    tl.store(slot_to_row_ptr + slots, tl.where(local >= 0, row, local), mask=slots < num_slots)
    tl.store(row_to_slot_ptr + row, slots, mask=(slots < num_slots) & (local >= 0))


def sort_slots(
    topk_ids: Tensor, num_experts: int, *, expert_map: Tensor | None = None, alignment: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    num_slots, int32 = topk_ids.numel(), {"dtype": torch.int32, "device": topk_ids.device}
    expert_offsets = torch.empty(num_experts + 1, **int32)
    slot_to_row = torch.empty(topk_ids.shape, **int32)
    row_to_slot = torch.full((max_rows(num_slots, num_experts, alignment),), -1, **int32)
    experts = triton.next_power_of_2(num_experts)
    block = min(MAX_BLOCK, max(16, TILE_ELEMENTS // experts))
    num_blocks = max(1, triton.cdiv(num_slots, block))
    counts = torch.empty((num_experts, num_blocks), **int32)
    totals = torch.empty(num_experts, **int32)
    map_size = 0 if expert_map is None else expert_map.numel()
    ids, sizes = (topk_ids, expert_map), (num_slots, num_experts, map_size, num_blocks)
    with on_device(topk_ids):
        _count_kernel[(num_blocks,)](*ids, counts, *sizes, BLOCK=block, EXPERTS=experts, num_warps=8)
        _scan_kernel[(num_experts,)](counts, totals, num_blocks, NUM_BLOCKS=triton.next_power_of_2(num_blocks))
        _place_kernel[(num_blocks,)](
            *ids, counts, totals, expert_offsets, slot_to_row, row_to_slot, *sizes, alignment,
            BLOCK=block, EXPERTS=experts, num_warps=8,
        )  # fmt: skip
    return expert_offsets, slot_to_row, row_to_slot
