"""out[t] = routed_scaling_factor * sum over k, in order, of topk_weights[t, k] * expert_out[slot_to_row[t, k]].

expert_out [P, H], slot_to_row int32 [T, K] (-1: skipped; no row of expert_out, as -2: the output row is NaN),
topk_weights float32 [T, K], out [T, H]. Every product and sum is rounded to float32 on its own, in slot order: a result
depends on its token alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_moe_ops.triton._common import EXACT, on_device, round_to, to_float32

COLUMNS = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _finalize_kernel(
    expert_out_ptr, slot_to_row_ptr, topk_weights_ptr, out_ptr, routed_scaling_factor, num_rows, hidden,
    TOP_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for k in range(TOP_K):
        row = tl.load(slot_to_row_ptr + token * TOP_K + k).to(tl.int64)
        inside = (row >= 0) & (row < num_rows)
        x = to_float32(tl.load(expert_out_ptr + row * hidden + cols, mask=inside & (cols < hidden), other=0.0))
        if topk_weights_ptr is not None:
            x *= tl.load(topk_weights_ptr + token * TOP_K + k)
        # A skipped slot adds nothing, whatever its weight holds.
        total += tl.where(inside, x, tl.where(row == -1, 0.0, float("nan")))
    out = round_to(total * routed_scaling_factor, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * hidden + cols, out, mask=cols < hidden)


def finalize(
    expert_out: Tensor, slot_to_row: Tensor, *, topk_weights: Tensor | None = None, routed_scaling_factor: float = 1.0
) -> Tensor:
    num_tokens, top_k = slot_to_row.shape
    hidden = expert_out.shape[1]
    out_dtype = torch.bfloat16 if expert_out.dtype == torch.float32 else expert_out.dtype
    out = torch.empty((num_tokens, hidden), dtype=out_dtype, device=expert_out.device)
    if out.numel() == 0:
        return out
    with on_device(expert_out):
        _finalize_kernel[(num_tokens, triton.cdiv(hidden, COLUMNS))](
            expert_out, slot_to_row, topk_weights, out, routed_scaling_factor, len(expert_out), hidden,
            TOP_K=top_k, COLUMNS=COLUMNS, num_warps=4, **EXACT,
        )  # fmt: skip
    return out
