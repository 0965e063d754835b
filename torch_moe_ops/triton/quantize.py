"""values, scale = quantize(input): each block of a row of input [..., K] shares one scale.

values [..., K / pack], scale [..., ceil(K / block)], both contiguous; bit-exact with torch_moe_ops.formats.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_moe_ops.formats import FORMATS
from torch_moe_ops.triton._common import (
    EXACT,
    as_stored,
    block_columns,
    load_global_scale,
    on_device,
    quantize_blocks,
    row_tile,
    row_warps,
    store_blocks,
    to_float32,
)


@triton.jit
def _quantize_kernel(
    input_ptr, global_scale_ptr, values_ptr, scale_ptr, k, scale_cols,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = block_columns(chunk, BLOCKS, BLOCK)
    x = to_float32(tl.load(input_ptr + row * k + cols, mask=cols < k, other=0.0))
    global_scale = load_global_scale(global_scale_ptr, None, 0, 0, 0)
    values, scale = quantize_blocks(x, global_scale, FORMAT, BLOCKS, BLOCK)
    store_blocks(values, scale, values_ptr, scale_ptr, row, chunk, k, scale_cols, 1, FORMAT, BLOCKS, BLOCK)


def quantize(input: Tensor, format: str, *, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    fmt = FORMATS[format]
    *lead, k = input.shape
    rows = math.prod(lead)
    scale_cols = fmt.act_scale_shape(1, k)[1]
    values = torch.empty((*lead, k // fmt.pack), dtype=fmt.dtype, device=input.device)
    scale = torch.empty((*lead, scale_cols), dtype=fmt.scale_dtype, device=input.device)
    if values.numel() == scale.numel() == 0:
        return values, scale
    tile = row_tile(fmt, k)
    grid = (rows, max(1, triton.cdiv(k, tile["BLOCKS"] * tile["BLOCK"])))
    with on_device(input):
        _quantize_kernel[grid](
            input, global_scale, as_stored(values), as_stored(scale), k, scale_cols,
            FORMAT=format, **tile, num_warps=row_warps(tile), **EXACT,
        )  # fmt: skip
    return values, scale
