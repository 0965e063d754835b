"""a [P, K/pack], b [E, N, K/pack] -> out [P, N]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import FORMATS, Format, get_format
from ..packed_weights import PACKABLE, expect_packed, has_scale_atoms, is_packed, weight_sizes
from ._check import (
    BF16_FP16,
    FLOAT32,
    FLOATS,
    INT32,
    expect_choice,
    expect_range,
    expect_sizes,
    expect_tensor,
    refuse,
    storage_dtypes,
)
from .pack_scale import check_packed
from .quantize import check_global_scale, check_pack

# Other than the format of the weights itself.
EIGHT_BIT_ACTS = {"mxfp4": ["mxfp8", "fp8_block", "fp8_block_e8m0"], "nvfp4": ["fp8_block", "fp8_block_e8m0"]}


def check(
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
) -> None:
    op, device = "grouped_gemm", a.device
    b_format, a_format = check_formats(op, format, act_format)
    num_rows, a_columns = expect_sizes(op, "a", a, storage_dtypes(a_format.dtype), ("P", "K"))
    k = a_columns * a_format.pack
    check_pack(op, "a", b_format, a, k)
    num_experts, n, _ = expect_weight(op, "b", b_format, a_format, b, ("E", "N", "K"), device)
    expect_range(op, "b_parts", b_parts, 1, 2**31 - 1)
    sizes = (num_experts, n, k)
    check_weight(op, "b", b_format, a_format, b, b_scale, b_global_scale, bias, sizes, b_parts, device)
    expect_tensor(op, "expert_offsets", expert_offsets, INT32, (num_experts + 1,), device)
    if expert_rows is not None:
        expect_tensor(op, "expert_rows", expert_rows, INT32, (num_experts,), device)
    if a_format.has_scale or a_scale is not None:
        if a_scale is None:
            refuse(op, "a_scale", f"a scale for {a_format.name}", None)
        shape = a_format.act_scale_shape(num_rows, k)
        expect_tensor(op, "a_scale", a_scale, storage_dtypes(a_format.scale_dtype), shape, device, contiguous=False)
    check_global_scale(op, "a_global_scale", a_format, a_global_scale, num_experts, device)
    expect_choice(op, "out_dtype", output_dtype(a.dtype, out_dtype), FLOATS)


def fake(
    a: Tensor, b: Tensor, expert_offsets: Tensor, *, out_dtype: torch.dtype | None = None, **options: object
) -> Tensor:
    check(a, b, expert_offsets, out_dtype=out_dtype, **options)
    n = weight_sizes(b, options.get("format", "bf16"))[1]
    return torch.empty((a.shape[0], n), dtype=output_dtype(a.dtype, out_dtype), device=a.device)


def output_dtype(dtype: torch.dtype, out_dtype: torch.dtype | None) -> torch.dtype:
    """Of out, for a of `dtype`: what the caller says, else that of 16-bit activations, else bfloat16."""
    if out_dtype is not None:
        return out_dtype
    return dtype if dtype in BF16_FP16 else torch.bfloat16


def check_formats(op: str, format: str, act_format: str) -> tuple[Format, Format]:
    """The formats of weights and activations: the same one, 16-bit activations, or 8-bit ones with FP4 weights."""
    weights = get_format(op, format)
    choices = [format] + ["bf16", "fp16"] * weights.has_scale + EIGHT_BIT_ACTS.get(format, [])
    if (act_format or format) not in choices:
        refuse(op, "act_format", f"{' or '.join(choices)} for {format} weights", act_format)
    return weights, FORMATS[act_format or format]


def expect_weight(
    op: str,
    name: str,
    format: Format,
    acts: Format,
    weight: Tensor,
    dims: tuple[str, str, str],
    device: torch.device,
) -> tuple[int, int, int]:
    """(E, N, K), K in values, of a weight [E, N, K/pack] or of one packed for `acts`."""
    if is_packed(weight) and format.name in PACKABLE:
        expect_packed(op, name, weight, format.name, acts.name)
    else:
        expect_sizes(op, name, weight, storage_dtypes(format.dtype), dims, device)
    return weight_sizes(weight, format.name)


def check_weight(
    op: str,
    name: str,
    format: Format,
    acts: Format,
    weight: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    sizes: tuple[int, int, int],
    parts: int,
    device: torch.device,
) -> None:
    """weight [E, N, K/pack], or packed for `acts`, with its scale, global scale and bias; sizes are (E, N, K), K in
    values."""
    num_experts, n, k = sizes
    scale_name, global_name = f"{name}_scale", f"{name}_global_scale"
    if n % parts:
        refuse(op, name, f"a multiple of {parts} rows per expert", list(weight.shape))
    packed = is_packed(weight) and format.name in PACKABLE
    if packed:
        expect_packed(op, name, weight, format.name, acts.name)
        got = weight_sizes(weight, format.name)
        if got != sizes or weight.device != device:
            refuse(op, name, f"packed {list(sizes)} on {device}", f"packed {list(got)} on {weight.device}")
        if scale is not None:
            refuse(op, scale_name, f"none beside packed {name}, which holds it", list(scale.shape))
    else:
        expect_tensor(op, name, weight, storage_dtypes(format.dtype), (num_experts, n, k // format.pack), device)
    if format.has_scale and not packed:
        if scale is None:
            refuse(op, scale_name, f"a scale for {format.name}", None)
        rows, columns = format.weight_scale_shape(n, k, parts)
        if has_scale_atoms(scale) and format.weight_block[0] == 1 and format.scale_dtype.itemsize == 1:
            check_packed(op, scale_name, scale, "atom", rows, columns, format.scale_dtype, device, lead=(num_experts,))
        else:
            shape, dtypes = (num_experts, rows, columns), storage_dtypes(format.scale_dtype)
            expect_tensor(op, scale_name, scale, dtypes, shape, device, contiguous=False)
    elif scale is not None:
        refuse(op, scale_name, f"none for {format.name}", list(scale.shape))
    if global_scale is not None:
        if not format.has_global_scale:
            refuse(op, global_name, f"none for {format.name}", list(global_scale.shape))
        shape = (num_experts, parts) if global_scale.dim() > 1 else (num_experts,)
        expect_tensor(op, global_name, global_scale, FLOAT32, shape, device)
    if bias is not None:
        expect_tensor(op, "bias" if name == "b" else f"{name}_bias", bias, FLOATS, (num_experts, n), device)
