"""Weights [E, N, K] from one way of storing them to another: explicit, chosen by the caller, with the error it costs.

    convert_weight     requantises: x = codes * scale * global_scale -> the nearest x' of another format
    fold_global_scale  keeps the codes: scale' = e4m3(scale * global_scale / new), new = 1 or a shared global scale

Nothing in this package converts by itself: an op that cannot take a format refuses it. The error is |x' - x| / |x|
(Frobenius, float64 sums) against the weights as the checkpoint stored them, on top of what storing them has cost.
Both work through the experts in chunks, so a layer never exists in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .formats import CHUNK_ELEMENTS, FORMATS, Format, encode_e4m3, get_format, quantize_weight
from .meta_kernels._check import FLOAT32, expect_choice, expect_range, expect_tensor, refuse
from .meta_kernels.grouped_gemm import check_weight
from .packed_weights import has_scale_atoms
from .reference.grouped_gemm import same_bits


class ConvertedWeight(NamedTuple):
    """A weight as the ops take it, and the relative error of the conversion (float64, no dimensions)."""

    weight: Tensor
    scale: Tensor | None
    global_scale: Tensor | None
    error: Tensor


@torch.no_grad()
def convert_weight(
    weight: Tensor,
    weight_scale: Tensor | None,
    format: str,
    to: str,
    *,
    weight_global_scale: Tensor | None = None,
    parts: int = 1,
) -> ConvertedWeight:
    """Requantises a weight [E, N, K/pack]: nvfp4 -> mxfp4, fp8_block -> mxfp8, anything -> bf16 and so on.

    Args:
        weight, weight_scale, weight_global_scale: in `format`, as `grouped_gemm` takes them.
        format, to: names in ``torch_moe_ops.FORMATS``.
        parts: equally tall matrices on top of each other: 2 for w13.

    The codes are rounded anew for the new scales. Keeping them and rounding the scales alone, as is sometimes done for
    UE4M3/16 -> UE8M0/32, costs several times the error. fp8_block -> mxfp8 is exact where scales are powers of two.

    Returns:
        weight, scale and global_scale as `grouped_gemm` takes them (None where the format has none), and the error
        |x' - x| / |x| of all of it, float64, Frobenius norms.

    Raises:
        RuntimeError: ``convert_weight: argument: expected ..., got ...``
    """
    op = "convert_weight"
    expect_choice(op, "to", to, FORMATS)
    source, target = get_format(op, format), FORMATS[to]
    _check(op, source, weight, weight_scale, weight_global_scale, parts)
    chunks, sums = [], _ErrorSums(weight.device)
    for chunk in _chunks(weight, source):
        x = _dequantize(source, chunk, weight, weight_scale, weight_global_scale, parts)
        values, scale, global_scale = quantize_weight(x, target, parts=parts)
        sums.add(x, target.dequantize(values, scale, target.weight_block, global_scale, parts))
        chunks.append((values, scale, global_scale))
    tensors = (None if column[0] is None else _concatenate(column) for column in zip(*chunks, strict=True))
    return ConvertedWeight(*tensors, sums.error())


@torch.no_grad()
def fold_global_scale(
    weight: Tensor, weight_scale: Tensor, weight_global_scale: Tensor, *, into: Tensor | None = None, parts: int = 1
) -> ConvertedWeight:
    """Moves the global scale of an nvfp4 weight into its block scales, for kernels that cannot apply it; codes stay.

        scale = e4m3(weight_scale * weight_global_scale / into);  what remains as global scale is into, or 1

    Args:
        weight, weight_scale, weight_global_scale: an nvfp4 weight; the global scale is float32 [E] or [E, parts].
        into: float32 [E] or [E, parts]. With the larger of gate's and up's global scales, both share one afterwards.
        parts: equally tall matrices on top of each other: 2 for w13.

    The block scales of a checkpoint fill e4m3's range; folded ones fall among its denormals, and what that costs
    depends on the magnitude of the weights. The ops take a global scale per part: for them this is never needed.

    Returns:
        weight, scale and global_scale as `grouped_gemm` takes them (None where the format has none), and the error
        |x' - x| / |x| of all of it, float64, Frobenius norms.

    Raises:
        RuntimeError: ``fold_global_scale: argument: expected ..., got ...``
    """
    op, fmt = "fold_global_scale", get_format("fold_global_scale", "nvfp4")
    if weight_global_scale is None:
        refuse(op, "weight_global_scale", "float32 [E] or [E, parts]", None)
    _check(op, fmt, weight, weight_scale, weight_global_scale, parts)
    new = torch.ones_like(weight_global_scale) if into is None else into
    shape = (len(weight), parts) if new.dim() > 1 else (len(weight),)
    expect_tensor(op, "into", new, FLOAT32, shape, weight.device)
    scale, sums = torch.empty_like(weight_scale), _ErrorSums(weight.device)
    for chunk in _chunks(weight, fmt):
        old_of_rows, new_of_rows = (_of_rows(g[chunk], scale.shape[1]) for g in (weight_global_scale, new))
        scale[chunk] = encode_e4m3(weight_scale[chunk].float() * old_of_rows / new_of_rows)
        x = _dequantize(fmt, chunk, weight, weight_scale, weight_global_scale, parts)
        sums.add(x, _dequantize(fmt, chunk, weight, scale, new, parts))
    return ConvertedWeight(weight, scale, into, sums.error())


class _ErrorSums:
    """|x' - x| / |x| over many chunks."""

    def __init__(self, device: torch.device) -> None:
        self.error_squared, self.norm_squared = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, x: Tensor, approximation: Tensor) -> None:
        self.error_squared += (approximation.double() - x.double()).square().sum()
        self.norm_squared += x.double().square().sum()

    def error(self) -> Tensor:
        """0 for weights that are all 0."""
        norm_squared = torch.where(self.norm_squared == 0, 1.0, self.norm_squared)
        return (self.error_squared / norm_squared).sqrt()


def _sizes(format: Format, weight: Tensor) -> tuple[int, int, int]:
    num_experts, n, columns = weight.shape
    return num_experts, n, columns * format.pack


def _check(
    op: str, format: Format, weight: Tensor, scale: Tensor | None, global_scale: Tensor | None, parts: int
) -> None:
    if weight.dim() != 3:
        refuse(op, "weight", "[E, N, K/pack]", list(weight.shape))
    expect_range(op, "parts", parts, 1)
    if scale is not None and has_scale_atoms(scale):
        refuse(op, "weight_scale", "[E, N, K / block_k], which unpack_scale gives", list(scale.shape))
    sizes = _sizes(format, weight)
    check_weight(op, "weight", format, format, weight, scale, global_scale, None, sizes, parts, weight.device)


def _chunks(weight: Tensor, format: Format) -> Iterator[slice]:
    """Slices of experts that are small enough to be held in float32; at least one."""
    num_experts, n, k = _sizes(format, weight)
    step = max(1, CHUNK_ELEMENTS // max(1, n * k))
    return (slice(first, first + step) for first in range(0, max(1, num_experts), step))


def _dequantize(
    format: Format, chunk: slice, weight: Tensor, scale: Tensor | None, global_scale: Tensor | None, parts: int
) -> Tensor:
    weight, scale = same_bits(weight, format.dtype), same_bits(scale, format.scale_dtype)
    scale, global_scale = (None if tensor is None else tensor[chunk] for tensor in (scale, global_scale))
    return format.dequantize(weight[chunk], scale, format.weight_block, global_scale, parts)


def _of_rows(global_scale: Tensor, rows: int) -> Tensor:
    """[E] or [E, parts] -> [E, rows, 1]."""
    per_part = global_scale.unsqueeze(-1) if global_scale.dim() == 2 else global_scale.view(-1, 1, 1)
    return per_part.repeat_interleave(rows // per_part.shape[1], dim=1)


def _concatenate(chunks: Sequence[Tensor]) -> Tensor:
    """torch.cat, which does not know all 8-bit floats."""
    dtype = chunks[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(chunks)
    return torch.cat([chunk.view(torch.uint8) for chunk in chunks]).view(dtype)
