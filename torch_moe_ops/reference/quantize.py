"""values, scale = quantize(input): input [rows, K] ~= values [rows, K/pack] * scale * global_scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format, get_format
from ..meta_kernels._sizes import act_scale_strides


def quantize(input: Tensor, format: str, *, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    values, scale = quantize_rows(get_format("quantize", format), input, global_scale)
    return values.clone() if values is input else values, scale


def quantize_rows(format: Format, x: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [rows, K] in the format; global_scale: one element or one per row. May return x itself if nothing changes."""
    if not len(x):
        global_scale = None  # of no row
    if global_scale is None or global_scale.numel() == 1:
        return format.quantize(x, format.act_block, None if global_scale is None else global_scale.reshape(1))
    values, scale = format.quantize(x.unsqueeze(1), format.act_block, global_scale)  # a row is a matrix of its own
    return values.squeeze(1), scale.squeeze(1)


def lay_out_scale(format: Format, scale: Tensor) -> Tensor:
    """The same scale [rows, columns] in the strides that permute and act_mul promise."""
    strides = act_scale_strides(format, *scale.shape)
    return torch.empty_strided(scale.shape, strides, dtype=scale.dtype, device=scale.device).copy_(scale)


def expert_of_rows(expert_offsets: Tensor, num_rows: int) -> Tensor:
    """The expert of each row, int64 [num_rows]; rows past the end count as the last expert's."""
    rows = torch.arange(num_rows, device=expert_offsets.device)
    expert = torch.searchsorted(expert_offsets.long(), rows, right=True) - 1
    return expert.clamp(max=len(expert_offsets) - 2)


def global_scale_of_rows(global_scale: Tensor | None, expert_offsets: Tensor | None, num_rows: int) -> Tensor | None:
    """None and one element stay; [E] becomes [num_rows]."""
    if global_scale is None or global_scale.numel() == 1:
        return global_scale
    return global_scale[expert_of_rows(expert_offsets, num_rows)]
