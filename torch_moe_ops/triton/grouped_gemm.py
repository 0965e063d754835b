"""out[r, n] = sum over k of a[r, k] * b[e, n, k] (+ bias[e, n]) for r in [expert_offsets[e], expert_offsets[e + 1]).

a [P, K] and b [E, N, K] row-major, out [P, N] in bfloat16, float16 or float32; b may be b_parts equally tall matrices
on top of each other.
    bf16, fp16   float32 accumulation over all of K
    fp8_block    a_scale [P, ceil(K/128)], b_scale [E, b_parts * ceil(N/b_parts/128), ceil(K/128)], any strides:
                 total = total + (sum over a 128-block of K) * (a_scale * b_scale), in K order
    int8         int32 accumulation, then * a_scale [P, 1] * b_scale [E, N, 1]
fp8_block and int8 weights also take bf16 and fp16 activations, which have no scale.

With expert_rows [E], the rows of expert e end at expert_offsets[e] + expert_rows[e] instead.

The grid covers the most tiles that P rows can make; which expert a tile belongs to is found on the device. K is never
split and always walked in the same steps by the same kind of instruction, so a row's result does not depend on the
other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_moe_ops.meta_kernels._sizes import max_rows
from torch_moe_ops.meta_kernels.grouped_gemm import output_dtype
from torch_moe_ops.triton._common import as_stored, decode_e4m3, on_device, round_to, to_float32

# Tiles of rows that walk the columns together, so that they share b's tiles in L2.
TILES_PER_GROUP = 8
SCALE_BLOCK = tl.constexpr(128)
# The fastest tiles of those measured on an H200: for many rows, for few, and for few with less shared memory.
TILES = tuple(
    {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
    for block_m, block_n, num_warps, num_stages in ((128, 256, 8, 3), (64, 128, 4, 4), (64, 128, 4, 3), (64, 128, 4, 2))
)
FORMATS_TAKEN = ("bf16", "fp16", "int8", "fp8_block")
TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
def _operand(x, DOT: tl.constexpr):
    """What is loaded -> what the dot takes; bytes hold e4m3."""
    if x.dtype != tl.uint8:
        return x.to(DOT)
    elif DOT == tl.float8e4nv:
        return x.to(DOT, bitcast=True)
    else:
        return decode_e4m3(x).to(DOT)


@triton.jit
def _accumulate(
    a_ptrs, b_ptrs, a_scale_ptrs, b_scale_ptrs, stride_a_scale_k, stride_b_scale_k,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALING: tl.constexpr, UNIFORM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sum over k [BLOCK_M, BLOCK_N], with block scales applied; int32 when both sides are int8."""
    ACC: tl.constexpr = tl.int32 if DOT == tl.int8 else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    offsets = tl.arange(0, BLOCK_K)
    for first_k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            inside = offsets < K - first_k
            a, b = tl.load(a_ptrs, mask=inside[None, :], other=0), tl.load(b_ptrs, mask=inside[:, None], other=0)
        a, b = _operand(a, DOT), _operand(b, DOT)
        if SCALING == "block":
            # One b_scale for all columns of the tile keeps the product a vector of BLOCK_M.
            scale = tl.load(b_scale_ptrs) if UNIFORM else tl.load(b_scale_ptrs)[None, :]
            if a_scale_ptrs is not None:
                scale = tl.load(a_scale_ptrs)[:, None] * scale
                a_scale_ptrs += stride_a_scale_k
            total += tl.dot(a, b) * scale
            b_scale_ptrs += stride_b_scale_k
        else:
            total = tl.dot(a, b, total, out_dtype=ACC)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    return total


# Not specialised on what changes from batch to batch: the number of tiles, and the stride of an MN-major a_scale.
@triton.jit(do_not_specialize=["tiles_m", "stride_a_scale_k"])
def _grouped_gemm_kernel(
    a_ptr, b_ptr, out_ptr, expert_offsets_ptr, expert_rows_ptr, a_scale_ptr, b_scale_ptr, bias_ptr,
    n, part_n, num_experts, tiles_m,
    stride_a_scale_row, stride_a_scale_k, stride_b_scale_expert, stride_b_scale_row, stride_b_scale_k,
    K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TILES_PER_GROUP: tl.constexpr, SCALING: tl.constexpr, UNIFORM: tl.constexpr, DOT: tl.constexpr,
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
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + safe_rows[:, None] * K + ks[None, :]
    b_ptrs = b_ptr + (expert * n + safe_cols)[None, :] * K + ks[:, None]
    a_scale_ptrs = None
    if a_scale_ptr is not None:
        a_scale_ptrs = a_scale_ptr + safe_rows * stride_a_scale_row
    b_scale_ptrs = None
    if SCALING != "none":
        scale_rows = safe_cols
        if SCALING == "block":
            scale_cols = tile_n * BLOCK_N if UNIFORM else safe_cols
            scale_rows = scale_cols // part_n * tl.cdiv(part_n, SCALE_BLOCK) + scale_cols % part_n // SCALE_BLOCK
        b_scale_ptrs = b_scale_ptr + expert * stride_b_scale_expert + scale_rows.to(tl.int64) * stride_b_scale_row
    out = _accumulate(
        a_ptrs, b_ptrs, a_scale_ptrs, b_scale_ptrs, stride_a_scale_k, stride_b_scale_k,
        K, BLOCK_M, BLOCK_N, BLOCK_K, SCALING, UNIFORM, DOT,
    ).to(tl.float32)  # fmt: skip
    if SCALING == "row":
        scale = tl.load(b_scale_ptrs)[None, :]
        if a_scale_ptrs is not None:
            scale = tl.load(a_scale_ptrs)[:, None] * scale
        out *= scale
    if bias_ptr is not None:
        out += to_float32(tl.load(bias_ptr + expert * n + safe_cols))[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :]
    tl.store(out_ptrs, round_to(out, out_ptr.dtype.element_ty), mask=(rows < end_row)[:, None] & (cols < n)[None, :])


def _dot_dtype(a: Tensor) -> tl.dtype:
    """What both operands become in front of tl.dot.

    Without fp8 tensor cores (below sm_89) e4m3 is widened to float16, which is exact.
    """
    if a.dtype == torch.int8:
        return tl.int8
    if not a.is_cuda:
        return tl.float32  # the interpreter would multiply bfloat16 bit patterns as integers
    if a.dtype == torch.float8_e4m3fn:
        return tl.float8e4nv if torch.cuda.get_device_capability(a.device) >= (8, 9) else tl.float16
    return TRITON_DTYPE[a.dtype]


def _tile(a: Tensor, b: Tensor, num_experts: int, dot: tl.dtype, scaling: str) -> dict[str, int]:
    """The first of TILES that suits and fits: a pure function of shapes, dtypes and the GPU's shared memory.

    64 rows are the fewest: few rows are bound by reading b, whatever their tile, and a Hopper tensor-core instruction
    takes 64, so that all batches use the same one. Block scales keep a second accumulator, for which the large tile has
    no registers. BLOCK_K never depends on the batch: it is one fp8_block scale, or 128 bytes of a.
    """
    a_bytes, b_bytes, dot_bytes = a.element_size(), b.element_size(), dot.primitive_bitwidth // 8
    block_k = 64 if (a_bytes, b_bytes) == (2, 2) else 128
    shared = torch.cuda.get_device_properties(a.device).shared_memory_per_block_optin if a.is_cuda else 0

    def fits(tile: dict[str, int]) -> bool:
        block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
        needed = tile["num_stages"] * block_k * (block_m * a_bytes + block_n * b_bytes)
        if b_bytes != dot_bytes:  # widened operands may pass through shared memory once more
            needed += block_k * (block_m + block_n) * dot_bytes
        return needed <= shared

    is_small = scaling == "block" or a.shape[0] <= 64 * num_experts
    tile = next(filter(fits, TILES[1 if is_small else 0 :]), TILES[-1])
    return {"BLOCK_K": block_k, **tile}


def expect_taken(op: str, format: str) -> None:
    """The block-scaled formats with e8m0 or two-level scales have no portable GEMM."""
    if format not in FORMATS_TAKEN:
        expected = f"one of {', '.join(FORMATS_TAKEN)} on the triton backend"
        raise RuntimeError(f"{op}: format: expected {expected}, got {format}")


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
    expect_taken("grouped_gemm", format)
    (rows, k), (num_experts, n, _) = a.shape, b.shape
    out = torch.empty((rows, n), dtype=output_dtype(a.dtype, out_dtype), device=a.device)
    if out.numel() == 0:
        return out
    dot = _dot_dtype(a)
    scaling = {"fp8_block": "block", "int8": "row"}.get(format, "none")
    tile = _tile(a, b, num_experts, dot, scaling)
    has_a_scale = scaling != "none" and a_scale is not None and a_scale.numel() > 0
    a_strides = a_scale.stride() if has_a_scale else (0, 0)
    b_strides = (0, 0, 0) if scaling == "none" else b_scale.stride()
    tiles_m = max_rows(rows, num_experts, tile["BLOCK_M"]) // tile["BLOCK_M"]
    with on_device(a):
        _grouped_gemm_kernel[(tiles_m * triton.cdiv(n, tile["BLOCK_N"]),)](
            as_stored(a), as_stored(b), out, expert_offsets, expert_rows, a_scale if has_a_scale else None,
            None if scaling == "none" else b_scale, bias, n, n // b_parts, num_experts, tiles_m, *a_strides, *b_strides,
            K=k, EXPERTS=triton.next_power_of_2(num_experts), TILES_PER_GROUP=TILES_PER_GROUP, SCALING=scaling,
            UNIFORM=(n // b_parts) % tile["BLOCK_N"] == 0, DOT=dot, **tile,
        )  # fmt: skip
    return out
