"""out[r, n] = sum over k of a[r, k] * b[e, n, k] (+ bias[e, n]) for r in [expert_offsets[e], expert_offsets[e + 1]).

a [P, K / pack] and b [E, N, K / pack] row-major, out [P, N] in bfloat16, float16 or float32; b may be b_parts equally
tall matrices on top of each other. With expert_rows [E] the rows of expert e end at expert_offsets[e] + expert_rows[e].

What a scale multiplies is decided by its format, for a and b each on its own:
    bf16, fp16                  no scale; float32 accumulation over all of K
    int8                        the result: int32 accumulation, then * a_scale [P, 1] * b_scale [E, N, 1]
    fp8_block, fp8_block_e8m0   the sum of a block, in K order:
                                total = total + (sum over a 128-block of K) * (a_scale * b_scale)
    mxfp8, mxfp4, nvfp4         the values, before the product. Value * scale has at most 6 significant bits, so it is
                                exact in bfloat16: tiles are widened in registers, on GPUs without such tensor cores
Scales [rows, ceil(K / block)] may have any strides; b's of the last three formats may be in the layout "atom" instead.
The global scales of nvfp4 multiply the float32 result, before the bias.

The grid covers the most tiles that P rows can make; which expert a tile belongs to is found on the device. K is never
split and always walked in the same steps by the same kind of instruction, so a row's result does not depend on the
other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_moe_ops.backends import expect_formats
from torch_moe_ops.formats import FORMATS
from torch_moe_ops.meta_kernels._sizes import max_rows
from torch_moe_ops.meta_kernels.grouped_gemm import output_dtype
from torch_moe_ops.packed_weights import has_scale_atoms, is_packed
from torch_moe_ops.triton._common import (
    as_stored,
    decode_e2m1,
    decode_e4m3,
    decode_scale,
    on_device,
    round_to,
    to_float32,
)

# Tiles of rows that walk the columns together, so that they share b's tiles in L2.
TILES_PER_GROUP = tl.constexpr(8)
SCALE_BLOCK = tl.constexpr(128)
# The fastest tiles of those measured on an H200: for many rows, for few, and for few with less shared memory.
TILES = tuple(
    {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
    for block_m, block_n, num_warps, num_stages in ((128, 256, 8, 3), (64, 128, 4, 4), (64, 128, 4, 3), (64, 128, 4, 2))
)


# Triton compares the globals that such functions name at each launch, so they name none.
@triton.constexpr_function
def scaled(format: str) -> str:
    """What a format's scale multiplies."""
    if format in ("mxfp8", "mxfp4", "nvfp4"):
        return "value"
    if format in ("fp8_block", "fp8_block_e8m0"):
        return "sum"
    return "result" if format == "int8" else "none"


@triton.constexpr_function
def _pack(format: str) -> int:
    return 2 if format in ("mxfp4", "nvfp4") else 1


@triton.constexpr_function
def _values_per_scale(format: str) -> int:
    return 16 if format == "nvfp4" else 32


@triton.jit
def _find_rows(
    expert_offsets_ptr, expert_rows_ptr, tile, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Expert, first row and end of rows of a tile; the expert is EXPERTS or more for tiles past the last."""
    e = tl.arange(0, EXPERTS)
    start = tl.load(expert_offsets_ptr + e, mask=e < num_experts, other=0)
    end = tl.load(expert_offsets_ptr + e + 1, mask=e < num_experts, other=0)
    if expert_rows_ptr is not None:
        expert_rows = tl.load(expert_rows_ptr + e, mask=e < num_experts, other=0)
        end = start + tl.minimum(tl.maximum(expert_rows, 0), end - start)
    tiles = tl.cdiv(end - start, BLOCK_M)
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    first_tile = tl.sum(tl.where(e < expert, tiles, 0), axis=0)
    is_mine = e == expert
    first_row = tl.sum(tl.where(is_mine, start, 0), axis=0) + (tile - first_tile) * BLOCK_M
    return expert, first_row, tl.sum(tl.where(is_mine, end, 0), axis=0)


@triton.jit
def _scale_ptrs(
    scale_ptr, rows, stride_row, stride_k, FORMAT: tl.constexpr, BLOCK_K: tl.constexpr, ATOM: tl.constexpr
):  # fmt: skip
    """To the scales of rows that go with the first BLOCK_K, and how far the next BLOCK_K's are. A pointer for each of
    the rows, or, to scales of values, [rows, blocks]."""
    if scaled(FORMAT) != "value":
        return scale_ptr + rows * stride_row, stride_k
    else:
        BLOCKS: tl.constexpr = BLOCK_K // _values_per_scale(FORMAT)
        blocks = tl.arange(0, BLOCKS)
        if ATOM:  # [rows / 128, blocks / 4, 32, 4, 4]; the strides are those of the first two dimensions
            rows = rows // 128 * stride_row + rows % 32 * 16 + rows // 32 % 4 * 4
            return scale_ptr + rows[:, None] + (blocks // 4 * stride_k + blocks % 4)[None, :], BLOCKS // 4 * stride_k
        else:
            return scale_ptr + rows[:, None] * stride_row + blocks[None, :] * stride_k, BLOCKS * stride_k


@triton.jit
def _widen(code, FP8: tl.constexpr):
    """e4m3 bytes -> float32, exact, by the GPU's own instruction where it has FP8."""
    return code.to(tl.float8e4nv, bitcast=True).to(tl.float32) if FP8 else decode_e4m3(code)


@triton.jit
def _operand(
    ptrs, scale_ptrs, left, FORMAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
    FP8: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, BLOCK_K] of a or b as the dot takes it; of K `left` is left, BLOCK_K or more if it is WHOLE."""
    PACK: tl.constexpr = _pack(FORMAT)
    if WHOLE:
        x = tl.load(ptrs)
    else:  # neighbours are compared with one bound, so that Triton keeps loads wide
        x = tl.load(ptrs, mask=(tl.arange(0, BLOCK_K // PACK) < left // PACK)[None, :], other=0)
    if scaled(FORMAT) == "value":
        BLOCK: tl.constexpr = _values_per_scale(FORMAT)
        BLOCKS: tl.constexpr = BLOCK_K // BLOCK
        if WHOLE:
            scale = tl.load(scale_ptrs)
        else:
            scale = tl.load(scale_ptrs, mask=(tl.arange(0, BLOCKS) < tl.cdiv(left, BLOCK))[None, :], other=0)
        value = tl.join(decode_e2m1(x, False), decode_e2m1(x, True)) if PACK == 2 else _widen(x, FP8)
        value = tl.reshape(value, [ROWS, BLOCKS, BLOCK]) * decode_scale(scale, FORMAT)[:, :, None]
        return tl.reshape(value, [ROWS, BLOCK_K]).to(DOT)
    elif x.dtype != tl.uint8:
        return x.to(DOT)
    elif DOT == tl.float8e4nv:
        return x.to(DOT, bitcast=True)
    else:
        return _widen(x, FP8).to(DOT)


@triton.jit
def _sum_scale(
    a_scale_ptrs, b_scale_ptrs, A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, UNIFORM: tl.constexpr
):  # fmt: skip
    """What a block's sum is multiplied with: one b_scale for all columns of the tile keeps it a vector of BLOCK_M."""
    if scaled(A_FORMAT) != "sum":
        b_scale = decode_scale(tl.load(b_scale_ptrs), B_FORMAT)
        return b_scale if UNIFORM else b_scale[None, :]
    elif scaled(B_FORMAT) != "sum":
        return decode_scale(tl.load(a_scale_ptrs), A_FORMAT)[:, None]
    else:
        b_scale = decode_scale(tl.load(b_scale_ptrs), B_FORMAT)
        return decode_scale(tl.load(a_scale_ptrs), A_FORMAT)[:, None] * (b_scale if UNIFORM else b_scale[None, :])


@triton.jit
def _accumulate(
    a_ptrs, b_ptrs, a_scale_ptrs, b_scale_ptrs, a_scale_step, b_scale_step,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, UNIFORM: tl.constexpr, FP8: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sum over k [BLOCK_M, BLOCK_N], with the scales of values and of sums applied; int32 when both sides are int8."""
    ACC: tl.constexpr = tl.int32 if DOT == tl.int8 else tl.float32
    A_SCALED: tl.constexpr = scaled(A_FORMAT)
    B_SCALED: tl.constexpr = scaled(B_FORMAT)
    WHOLE: tl.constexpr = K % BLOCK_K == 0
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for first_k in range(0, K, BLOCK_K):
        a = _operand(a_ptrs, a_scale_ptrs, K - first_k, A_FORMAT, BLOCK_M, BLOCK_K, WHOLE, FP8, DOT)
        b = tl.trans(_operand(b_ptrs, b_scale_ptrs, K - first_k, B_FORMAT, BLOCK_N, BLOCK_K, WHOLE, FP8, DOT))
        if A_SCALED == "sum" or B_SCALED == "sum":
            scale = _sum_scale(a_scale_ptrs, b_scale_ptrs, A_FORMAT, B_FORMAT, UNIFORM)
            total += tl.dot(a, b) * scale
        else:
            total = tl.dot(a, b, total, out_dtype=ACC)
        a_ptrs += BLOCK_K // _pack(A_FORMAT)
        b_ptrs += BLOCK_K // _pack(B_FORMAT)
        if A_SCALED == "sum" or A_SCALED == "value":
            a_scale_ptrs += a_scale_step
        if B_SCALED == "sum" or B_SCALED == "value":
            b_scale_ptrs += b_scale_step
    return total


# Not specialised on what changes from batch to batch: the number of tiles, and the stride of an MN-major a_scale. That
# of a K-major one is known to be 1, which lets its loads be wide.
@triton.jit(do_not_specialize=["tiles_m", "stride_a_scale_k"])
def _grouped_gemm_kernel(
    a_ptr, b_ptr, out_ptr, expert_offsets_ptr, expert_rows_ptr, a_scale_ptr, b_scale_ptr,
    a_global_scale_ptr, b_global_scale_ptr, bias_ptr, n, part_n, num_experts, tiles_m,
    stride_a_scale_row, stride_a_scale_k, stride_b_scale_expert, stride_b_scale_row, stride_b_scale_k,
    stride_a_global, stride_b_global, stride_b_global_part,
    K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, K_MAJOR: tl.constexpr, ATOM: tl.constexpr, UNIFORM: tl.constexpr,
    FP8: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (TILES_PER_GROUP * tiles_n)
    group_height = tl.minimum(tiles_m - group * TILES_PER_GROUP, TILES_PER_GROUP)
    in_group = tl.program_id(0) % (TILES_PER_GROUP * tiles_n)
    tile_m, tile_n = group * TILES_PER_GROUP + in_group % group_height, in_group // group_height
    expert, first_row, end_row = _find_rows(expert_offsets_ptr, expert_rows_ptr, tile_m, num_experts, EXPERTS, BLOCK_M)
    if expert >= num_experts:
        return
    expert = expert.to(tl.int64)
    rows, cols = first_row + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Lanes past the end repeat the last row and column, which always exist; only their stores are masked.
    safe_rows, safe_cols = tl.minimum(rows, end_row - 1).to(tl.int64), tl.minimum(cols, n - 1)
    A_PACK: tl.constexpr = _pack(A_FORMAT)
    B_PACK: tl.constexpr = _pack(B_FORMAT)
    a_ptrs = a_ptr + safe_rows[:, None] * (K // A_PACK) + tl.arange(0, BLOCK_K // A_PACK)[None, :]
    b_ptrs = b_ptr + (expert * n + safe_cols)[:, None] * (K // B_PACK) + tl.arange(0, BLOCK_K // B_PACK)[None, :]
    a_scale_ptrs, a_scale_step = None, None
    if a_scale_ptr is not None:
        a_scale_ptrs, a_scale_step = _scale_ptrs(
            a_scale_ptr, safe_rows, stride_a_scale_row, 1 if K_MAJOR else stride_a_scale_k, A_FORMAT, BLOCK_K, False
        )
    b_scale_ptrs, b_scale_step = None, None
    if b_scale_ptr is not None:
        scale_rows = safe_cols
        if scaled(B_FORMAT) == "sum":
            scale_cols = tile_n * BLOCK_N if UNIFORM else safe_cols
            scale_rows = scale_cols // part_n * tl.cdiv(part_n, SCALE_BLOCK) + scale_cols % part_n // SCALE_BLOCK
        b_scale_ptrs, b_scale_step = _scale_ptrs(
            b_scale_ptr + expert * stride_b_scale_expert, scale_rows.to(tl.int64), stride_b_scale_row, stride_b_scale_k,
            B_FORMAT, BLOCK_K, ATOM,
        )  # fmt: skip
    out = _accumulate(
        a_ptrs, b_ptrs, a_scale_ptrs, b_scale_ptrs, a_scale_step, b_scale_step,
        K, BLOCK_M, BLOCK_N, BLOCK_K, A_FORMAT, B_FORMAT, UNIFORM, FP8, DOT,
    ).to(tl.float32)  # fmt: skip
    if scaled(B_FORMAT) == "result":
        scale = tl.load(b_scale_ptrs)[None, :]
        out *= tl.load(a_scale_ptrs)[:, None] * scale if a_scale_ptr is not None else scale
    if a_global_scale_ptr is not None:
        out *= tl.load(a_global_scale_ptr + expert * stride_a_global)
    if b_global_scale_ptr is not None:
        parts = b_global_scale_ptr + expert * stride_b_global + safe_cols // part_n * stride_b_global_part
        out *= tl.load(parts)[None, :]
    if bias_ptr is not None:
        out += to_float32(tl.load(bias_ptr + expert * n + safe_cols))[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :]
    tl.store(out_ptrs, round_to(out, out_ptr.dtype.element_ty), mask=(rows < end_row)[:, None] & (cols < n)[None, :])


class Gpu(NamedTuple):
    """What a launch is made for; the interpreter on a CPU is no GPU."""

    sm: int  # compute capability, 90 for 9.0
    shared_memory: int  # bytes that a program can have


def _gpu(device: torch.device) -> Gpu | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return Gpu(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin)


def _dot_dtype(gpu: Gpu | None, format: str, act_format: str) -> tl.dtype:
    """What both operands become in front of tl.dot, exactly.

    bfloat16 holds e4m3, and e2m1 or e4m3 times the scale of its block. float16 holds e4m3, and of the scaled values
    nvfp4's only: next to float16 activations those of mxfp8 and mxfp4 stay float32, and tensor cores read both operands
    as tf32, which has float16's mantissa and bfloat16's exponent.
    """
    if act_format == "int8":
        return tl.int8
    if gpu is None:
        return tl.float32  # the interpreter would multiply bfloat16 bit patterns as integers
    if scaled(act_format) == scaled(format) == "sum":
        return tl.float8e4nv if gpu.sm >= 89 else tl.float16
    if act_format == "fp16":
        return tl.float32 if format in ("mxfp8", "mxfp4") else tl.float16
    return tl.bfloat16


def _tile(gpu: Gpu | None, rows: int, num_experts: int, format: str, act_format: str, dot: tl.dtype) -> dict[str, int]:
    """The first of TILES that suits and fits: a pure function of shapes, formats and the GPU's shared memory.

    64 rows are the fewest: few rows are bound by reading b, whatever their tile, and a Hopper tensor-core instruction
    takes 64, so that all batches use the same one. Block scales keep a second accumulator or widen values in registers,
    for which the large tile has no registers. BLOCK_K never depends on the batch: it is one fp8_block scale, or 128
    bytes of a.
    """
    a_bits, b_bits = (8 * FORMATS[name].dtype.itemsize // FORMATS[name].pack for name in (act_format, format))
    dot_bits = dot.primitive_bitwidth
    block_k = 64 if (a_bits, b_bits) == (16, 16) else 128

    def fits(tile: dict[str, int]) -> bool:
        block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
        needed = tile["num_stages"] * block_k * (block_m * a_bits + block_n * b_bits) // 8
        if b_bits != dot_bits:  # widened operands may pass through shared memory once more
            needed += block_k * (block_m + block_n) * dot_bits // 8
        return gpu is not None and needed <= gpu.shared_memory

    has_blocks = {scaled(format), scaled(act_format)} & {"sum", "value"}
    is_small = has_blocks or rows <= 64 * num_experts
    tile = next(filter(fits, TILES[1 if is_small else 0 :]), TILES[-1])
    return {"BLOCK_K": block_k, **tile}


def _global_strides(a_global_scale: Tensor | None, b_global_scale: Tensor | None) -> tuple[int, int, int]:
    """How far apart the a_global_scale of two experts is, the b_global_scale of two experts, and that of two parts."""
    a_stride = 0 if a_global_scale is None or a_global_scale.numel() == 1 else 1
    if b_global_scale is None:
        return a_stride, 0, 0
    parts = b_global_scale.shape[1] if b_global_scale.dim() == 2 else 0
    return a_stride, max(parts, 1), min(parts, 1)


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
    act_format = act_format or format
    expect_formats("grouped_gemm", "triton", format, act_format, is_packed(b))
    (rows, _), (num_experts, n, k) = a.shape, b.shape
    out = torch.empty((rows, n), dtype=output_dtype(a.dtype, out_dtype), device=a.device)
    if out.numel() == 0 or num_experts == 0:
        return out
    gpu = _gpu(a.device)
    dot = _dot_dtype(gpu, format, act_format)
    tile = _tile(gpu, rows, num_experts, format, act_format, dot)
    a_scale = a_scale if FORMATS[act_format].has_scale else None  # of bf16 and fp16 it is empty
    a_strides = (0, 0) if a_scale is None else a_scale.stride()
    b_strides = (0, 0, 0) if b_scale is None else b_scale.stride()[:3]
    tiles_m = max_rows(rows, num_experts, tile["BLOCK_M"]) // tile["BLOCK_M"]
    with on_device(a):
        _grouped_gemm_kernel[(tiles_m * triton.cdiv(n, tile["BLOCK_N"]),)](
            as_stored(a), as_stored(b), out, expert_offsets, expert_rows,
            as_stored(a_scale), as_stored(b_scale), a_global_scale, b_global_scale, bias,
            n, n // b_parts, num_experts, tiles_m,
            *a_strides, *b_strides, *_global_strides(a_global_scale, b_global_scale),
            K=k * FORMATS[format].pack, EXPERTS=triton.next_power_of_2(num_experts),
            A_FORMAT=act_format, B_FORMAT=format, K_MAJOR=a_strides[1] == 1, ATOM=has_scale_atoms(b_scale),
            UNIFORM=(n // b_parts) % tile["BLOCK_N"] == 0, FP8=gpu is not None and gpu.sm >= 89, DOT=dot, **tile,
        )  # fmt: skip
    return out
