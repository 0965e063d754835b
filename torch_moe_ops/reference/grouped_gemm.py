"""out[r, n] = sum over k of a[r, k] * b[e, n, k] (+ bias[e, n]) for rows r of expert e: a [P, K], b [E, N, K].

With expert_rows [E], only the first expert_rows[e] rows of expert e.

It reads expert_offsets on the host: a definition, not a kernel. The result of a row does not depend on the other rows:
rows are multiplied in tiles of a fixed height, so that the matrix library takes the same path for every batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import get_format
from ..meta_kernels._check import refuse
from ..meta_kernels.grouped_gemm import output_dtype
from ..packed_weights import as_stored
from ._values import expect_offset_values

ROW_TILE = 16


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    expert_offsets: Tensor,
    *,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    a_global_scale: Tensor | None = None,
    b_global_scale: Tensor | None = None,
    bias: Tensor | None = None,
    expert_rows: Tensor | None = None,
    format: str = "bf16",
    act_format: str = "",
    b_parts: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    expect_offset_values("grouped_gemm", expert_offsets, len(a))
    b_format = get_format("grouped_gemm", format)
    a_format = get_format("grouped_gemm", act_format or format)
    b, b_scale = as_stored(b, b_scale, format)
    a, a_scale = same_bits(a, a_format.dtype), same_bits(a_scale, a_format.scale_dtype)
    b, b_scale = same_bits(b, b_format.dtype), same_bits(b_scale, b_format.scale_dtype)
    out = torch.zeros((a.shape[0], b.shape[1]), dtype=output_dtype(a.dtype, out_dtype), device=a.device)
    for e, rows in enumerate(_rows_in_use(expert_offsets, expert_rows)):
        if rows.start == rows.stop:
            continue
        row_scale = a_scale[rows] if a_format.has_scale else None
        expert_scale = b_scale[e] if b_format.has_scale else None
        if a_format.name == b_format.name == "fp8_block":
            product = block_scaled_matmul(a[rows], row_scale, b[e], expert_scale, b_parts)
        else:
            x = a_format.dequantize(a[rows], row_scale, a_format.act_block, _of_expert(a_global_scale, e))
            w = b_format.dequantize(b[e], expert_scale, b_format.weight_block, _of_expert(b_global_scale, e), b_parts)
            product = tiled_matmul(x, w)
        out[rows] = product if bias is None else product + bias[e].float()
    return out


def tiled_matmul(x: Tensor, w: Tensor) -> Tensor:
    """x [rows, K] @ w [N, K]^T in float32, also under autocast, ROW_TILE rows at a time, the last tile filled up with
    zeros."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.cat([tile @ w.T for tile in _tiles(x)])[: len(x)]


def block_scaled_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, b_parts: int) -> Tensor:
    """fp8_block: sum over blocks j, in order, of (a[:, j] @ b[:, j]^T in float32) * (a_scale[:, j] * b_scale[:, j])."""
    n, k = b.shape
    part_rows = torch.arange(n, device=b.device) % (n // b_parts)
    part = torch.arange(n, device=b.device) // (n // b_parts)
    scale_row = part * (b_scale.shape[0] // b_parts) + part_rows // 128  # the row of b_scale for each row of b
    total = torch.zeros((len(a), n), dtype=torch.float32, device=a.device)
    for j, start in enumerate(range(0, k, 128)):
        block = slice(start, start + 128)
        partial = tiled_matmul(a[:, block].float(), b[:, block].float())
        total += partial * (a_scale[:, j, None] * b_scale[scale_row, j])
    return total


def same_bits(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor under the format's own dtype; 4-bit values and e8m0 scales may come under another name."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.view(dtype)


def _rows_in_use(expert_offsets: Tensor, expert_rows: Tensor | None) -> list[slice]:
    """Of each expert. A value of expert_rows outside the expert's range: an error on a CPU, else clamped."""
    first, size = expert_offsets[:-1], expert_offsets.diff()
    rows = size
    if expert_rows is not None:
        rows = expert_rows.clamp(min=0).minimum(size)
        if rows.device.type == "cpu" and not torch.equal(rows, expert_rows):
            e = int((rows != expert_rows).nonzero()[0])
            got = f"{int(expert_rows[e])} for expert {e} of {int(size[e])} rows"
            refuse("grouped_gemm", "expert_rows", "values in [0, rows of the expert]", got)
    return [slice(start, start + count) for start, count in zip(first.tolist(), rows.tolist(), strict=True)]


def _tiles(x: Tensor) -> tuple[Tensor, ...]:
    padding = -len(x) % ROW_TILE
    return torch.nn.functional.pad(x, (0, 0, 0, padding)).split(ROW_TILE)


def _of_expert(global_scale: Tensor | None, expert: int) -> Tensor | None:
    """None and one element stay; [E] or [E, parts] gives the expert's."""
    if global_scale is None or global_scale.numel() == 1:
        return global_scale
    return global_scale[expert]
