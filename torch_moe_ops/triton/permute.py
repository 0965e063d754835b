"""permuted[slot_to_row[t, k]] = quantize(hidden_states[t] * (topk_weights[t, k] if given)).

hidden_states [T, H], slot_to_row int32 [T, K] (negative: no row) -> permuted [num_rows, H / pack],
permuted_scale [num_rows, scale columns] (MN-major for fp8_block). A token is quantised once, unless its rows differ: by
weight, or by their expert's global scale.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_moe_ops.formats import FORMATS
from torch_moe_ops.meta_kernels._sizes import empty_act_scale, empty_values
from torch_moe_ops.triton._common import (
    EXACT,
    as_stored,
    block_columns,
    expert_bound,
    load_global_scale,
    on_device,
    quantize_blocks,
    row_tile,
    row_warps,
    store_blocks,
    to_float32,
)


@triton.jit(do_not_specialize=["num_rows", "stride_scale_k"])  # of an MN-major scale: it changes with the rows, too
def _permute_kernel(
    hidden_states_ptr, slot_to_row_ptr, topk_weights_ptr, global_scale_ptr, expert_offsets_ptr,
    permuted_ptr, permuted_scale_ptr, num_rows, hidden, num_experts, stride_scale_row, stride_scale_k,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, FORMAT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = block_columns(chunk, BLOCKS, BLOCK)
    x = to_float32(tl.load(hidden_states_ptr + token * hidden + cols, mask=cols < hidden, other=0.0))
    ROWS_DIFFER: tl.constexpr = topk_weights_ptr is not None or EXPERTS > 0
    if not ROWS_DIFFER:
        global_scale = load_global_scale(global_scale_ptr, None, 0, 0, 0)
        values, scale = quantize_blocks(x, global_scale, FORMAT, BLOCKS, BLOCK)
    for k in range(TOP_K):
        slot = token * TOP_K + k
        row = tl.load(slot_to_row_ptr + slot).to(tl.int64)
        if (row >= 0) & (row < num_rows):
            if ROWS_DIFFER:
                weight = 1.0 if topk_weights_ptr is None else tl.load(topk_weights_ptr + slot)
                global_scale = load_global_scale(global_scale_ptr, expert_offsets_ptr, row, num_experts, EXPERTS)
                row_values, row_scale = quantize_blocks(x * weight, global_scale, FORMAT, BLOCKS, BLOCK)
            else:
                row_values, row_scale = values, scale
            store_blocks(
                row_values, row_scale, permuted_ptr, permuted_scale_ptr, row, chunk, hidden,
                stride_scale_row, stride_scale_k, FORMAT, BLOCKS, BLOCK,
            )  # fmt: skip


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
    fmt = FORMATS[format]
    (num_tokens, top_k), hidden = slot_to_row.shape, hidden_states.shape[1]
    permuted = empty_values(fmt, num_rows, hidden, hidden_states.device)
    permuted_scale = empty_act_scale(fmt, num_rows, hidden, hidden_states.device)
    if slot_to_row.numel() == 0 or permuted.numel() == permuted_scale.numel() == 0:
        return permuted, permuted_scale
    num_experts, experts = expert_bound(global_scale, expert_offsets)
    tile = row_tile(fmt, hidden)
    grid = (num_tokens, max(1, triton.cdiv(hidden, tile["BLOCKS"] * tile["BLOCK"])))
    with on_device(hidden_states):
        _permute_kernel[grid](
            hidden_states, slot_to_row, topk_weights, global_scale, expert_offsets,
            as_stored(permuted), as_stored(permuted_scale), num_rows, hidden, num_experts, *permuted_scale.stride(),
            TOP_K=top_k, EXPERTS=experts, FORMAT=format, **tile, num_warps=row_warps(tile), **EXACT,
        )  # fmt: skip
    return permuted, permuted_scale
