"""input [rows, K] -> values [rows, K/pack], scale [rows, scale columns]; both contiguous for every format."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format, get_format
from ._check import BF16_FP16, FLOAT32, FLOATS, expect_sizes, expect_tensor, refuse
from ._sizes import empty_values


def check(input: Tensor, format: str, *, global_scale: Tensor | None = None) -> None:
    fmt = get_format("quantize", format)
    _, k = expect_sizes("quantize", "input", input, FLOATS, ("rows", "K"))
    check_pack("quantize", "input", fmt, input, k)
    check_global_scale("quantize", "global_scale", fmt, global_scale, None, input.device)


def fake(input: Tensor, format: str, *, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check(input, format, global_scale=global_scale)
    fmt = get_format("quantize", format)
    rows, k = input.shape
    scale = torch.empty(fmt.act_scale_shape(rows, k), dtype=fmt.scale_dtype, device=input.device)
    return empty_values(fmt, rows, k, input.device), scale


def check_pack(op: str, name: str, format: Format, tensor: Tensor, k: int) -> None:
    """Two 4-bit values share a byte."""
    if format.pack > 1 and k % format.pack:
        refuse(op, name, f"a multiple of {format.pack} columns for {format.name}", list(tensor.shape))


def check_unquantised(op: str, name: str, format: Format, dtype: torch.dtype) -> None:
    """bf16 and fp16 store the numbers as they are: no conversion between the two on the way."""
    if not format.has_scale and dtype in BF16_FP16 and dtype != format.dtype:
        expected = "bf16" if dtype == torch.bfloat16 else "fp16"
        refuse(op, name, f"{expected} or a quantised format for {dtype} values".replace("torch.", ""), format.name)


def check_global_scale(
    op: str, name: str, format: Format, global_scale: Tensor | None, num_experts: int | None, device: torch.device
) -> None:
    """None, one element, or one per expert where the experts are known; only for formats that have a global scale."""
    if global_scale is None:
        return
    if not format.has_global_scale:
        refuse(op, name, f"none for {format.name}", list(global_scale.shape))
    if global_scale.dim() == 0:
        expect_tensor(op, name, global_scale, FLOAT32, (), device)
    elif num_experts is None or global_scale.shape == (1,):
        expect_tensor(op, name, global_scale, FLOAT32, (1,), device)
    else:
        expect_tensor(op, name, global_scale, FLOAT32, (num_experts,), device)
