"""out[r, n] = sum over k of a[r, k] * b[e, n, k] (+ bias[e, n]) for rows r of expert e: a [P, K], b [E, N, K]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Gemm
from ..meta_kernels.grouped_gemm import output_dtype
from ..packed_weights import is_packed, weight_sizes

SCHEMA = """(Tensor a, Tensor b, Tensor expert_offsets, *, Tensor? a_scale=None, Tensor? b_scale=None,
Tensor? a_global_scale=None, Tensor? b_global_scale=None, Tensor? bias=None, Tensor? expert_rows=None,
str format="bf16", str act_format="", int b_parts=1, ScalarType? out_dtype=None) -> Tensor"""


def facts(
    a: Tensor,
    b: Tensor,
    expert_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    format: str = "bf16",
    act_format: str = "",
    b_parts: int = 1,
    out_dtype: torch.dtype | None = None,
    **_: object,
) -> dict[str, object]:
    num_experts, n, k = weight_sizes(b, format)
    return {
        "format": format,
        "act_format": act_format,
        "gemms": (Gemm(n, k, b_parts),),
        "num_experts": num_experts,
        "out_dtype": output_dtype(a.dtype, out_dtype),
        "bias_dtype": None if bias is None else bias.dtype,
        "packed": is_packed(b),
    }


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
    """One matrix product per expert, over the expert's rows.

        out[r, n] = sum over k of a[r, k] * b[e, n, k] (+ bias[e, n]),  expert_offsets[e] <= r < expert_offsets[e + 1]

    a and b are dequantised (value * scale * global_scale) and summed in float32. With fp8_block on both sides each
    128-K block is summed on its own, multiplied by a_scale * b_scale and added to the total in K order.

    The masked form, x [E, max_m, K] of which expert e uses rows [0, masked_m[e]), is a = x.flatten(0, 1),
    expert_offsets = max_m * arange(E + 1) and expert_rows = masked_m.

    Args:
        a: activations [P, K/pack] in `act_format`, contiguous.
        b: weights [E, N, K/pack] in `format`, contiguous; or the result of `pack_weight` for these activations, which
            holds b_scale.
        expert_offsets: int32 [E + 1], from `sort_slots`.
        a_scale: [P, scale columns], any strides; as `permute`, `act_mul` or `quantize` give it.
        b_scale: [E, b_parts * ceil(N / b_parts / block_rows), ceil(K / block_k)], any strides; for nvfp4, mxfp4 and
            mxfp8 also ``pack_scale(b_scale, "atom")``, which the kernels of SM100 and SM120 then need not make.
        a_global_scale: float32, one element or [E]; nvfp4 activations only.
        b_global_scale: float32 [E, b_parts] or [E]; nvfp4 weights only.
        bias: bfloat16, float16 or float32 [E, N].
        expert_rows: int32 [E], how many rows of its range each expert uses, the first ones; if absent all of them.
            A value that does not fit the range is an error on a CPU, and clamped on a GPU.
        format: of b.
        act_format: of a; "" = `format`. "bf16" or "fp16" with quantised weights is weight-only quantisation; nvfp4 and
            mxfp4 weights also take "fp8_block" and "fp8_block_e8m0", mxfp4 "mxfp8".
        b_parts: b[e] is this many equally tall matrices on top of each other (2 for w13: gate over up); scale blocks
            and global scales are counted within each.
        out_dtype: bfloat16, float16 or float32; if absent that of a where it is bfloat16 or float16, else bfloat16.

    Returns:
        [P, N]. Rows that no expert uses are unspecified, and what a holds there does not matter.

    Raises:
        RuntimeError: ``grouped_gemm: argument: expected ..., got ...``; on a CPU for values of expert_offsets and
            expert_rows, too.

    Sources: `quantize`'s for the formats; DeepSeek-V3, arXiv:2412.19437, section 3.3.2, for sums of 128 k that are
    scaled and added in float32.
    """
    return torch.ops.moe.grouped_gemm.default(
        a,
        b,
        expert_offsets,
        a_scale=a_scale,
        b_scale=b_scale,
        a_global_scale=a_global_scale,
        b_global_scale=b_global_scale,
        bias=bias,
        expert_rows=expert_rows,
        format=format,
        act_format=act_format,
        b_parts=b_parts,
        out_dtype=out_dtype,
    )
