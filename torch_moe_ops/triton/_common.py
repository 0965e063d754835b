"""What the portable kernels share: number encodings, the block quantiser, and small launch helpers.

Encodings are written in integer arithmetic instead of Triton casts, for two reasons: the fp8 conversion instructions
exist only from sm_89 on, and Triton's CPU interpreter neither rounds to nearest even nor widens denormals right. So the
same lines give the same bits on every GPU and in the interpreter.

`quantize_blocks` maps x float32 [BLOCKS, BLOCK] (one row of a matrix, BLOCK values per scale) to values
[BLOCKS, BLOCK / pack] and scale [BLOCKS], bit for bit as torch_moe_ops.formats does. Kernels that call it are launched
with `EXACT`: a fused multiply-add would round once instead of twice.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_moe_ops.formats import Format

# Launch options of every kernel whose float32 results are defined to the bit.
EXACT = {"enable_fp_fusion": False}
# Values of a row that one program holds: enough loads in flight for the memory-bound kernels at 4 to 8 warps.
ROW_CHUNK = 4096

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
AMAX_MIN = tl.constexpr(1e-10)
# Adding then subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, ties to even.
ROUND_MAGIC = tl.constexpr(12582912.0)
# The bits that are left of a code at the top of an int32, shifted right until exponents meet: its sign at bit 31, and
# its other bits from the exponent's lowest on. The shift's copies of the sign are cut off.
E4M3_IN_FLOAT32 = tl.constexpr(0x87F00000 - 2**32)
E2M1_IN_FLOAT32 = tl.constexpr(0x81C00000 - 2**32)
TWO_POW_120 = tl.constexpr(2.0**120)
TWO_POW_126 = tl.constexpr(2.0**126)
# The ulp of 2^14 is 2^-9, the step of e4m3's denormals.
E4M3_DENORMAL_MAGIC = tl.constexpr(16384.0)


# ---- host side -------------------------------------------------------------------------------------------------------


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def as_stored(tensor: Tensor | None) -> Tensor | None:
    """8-bit floats as bytes: Triton refuses their types where the GPU lacks the conversions."""
    if tensor is None or not tensor.dtype.is_floating_point or tensor.element_size() > 1:
        return tensor
    return tensor.view(torch.uint8)


def row_tile(fmt: Format, k: int) -> dict[str, int]:
    """How a row of k values is cut: BLOCKS scale blocks of BLOCK values to a program (one where a row has one)."""
    block = fmt.act_block[1] if fmt.has_scale else 1
    if block is None:
        return {"BLOCKS": 1, "BLOCK": triton.next_power_of_2(max(1, k))}
    chunk = min(ROW_CHUNK, triton.next_power_of_2(k))
    return {"BLOCKS": max(1, chunk // block), "BLOCK": block} if fmt.has_scale else {"BLOCKS": 1, "BLOCK": chunk}


def expert_bound(global_scale: Tensor | None, expert_offsets: Tensor | None) -> tuple[int, int]:
    """(num_experts, EXPERTS = the next power of two), both 0 unless each expert has its own global scale."""
    if global_scale is None or global_scale.numel() == 1 or expert_offsets is None:
        return 0, 0
    return global_scale.numel(), triton.next_power_of_2(global_scale.numel())


def row_warps(tile: dict[str, int]) -> int:
    """Warps for a row tile: about 16 values a thread."""
    return min(16, max(1, tile["BLOCKS"] * tile["BLOCK"] // 512))


# ---- number encodings ------------------------------------------------------------------------------------------------


@triton.jit
def to_float32(x):
    """bfloat16, float16 or float32 -> float32, exact."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 -> dtype (bfloat16, float16 or float32), ties to even."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def encode_e4m3(x):
    """float32 -> e4m3 byte: saturating, ties to even, NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    magnitude_bits = magnitude.to(tl.int32, bitcast=True)
    # Round the mantissa to 3 bits, then move the exponent bias from 127 to 7.
    normal = ((magnitude_bits + 0x7FFFF + ((magnitude_bits >> 20) & 1)) >> 20) - (120 << 3)
    denormal = (magnitude + E4M3_DENORMAL_MAGIC).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0.015625, denormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_e4m3(code):
    """e4m3 byte -> float32, exact: the bits sit in float32's exponent and mantissa with a bias 120 too small."""
    bits = ((code.to(tl.int32) << 24) >> 4) & E4M3_IN_FLOAT32
    return tl.where((code & 0x7F) == 0x7F, float("nan"), bits.to(tl.float32, bitcast=True) * TWO_POW_120)


@triton.jit
def decode_e2m1(byte, HIGH: tl.constexpr):
    """The e2m1 code in the low or high half of a byte -> float32, exact: likewise, with a bias 126 too small."""
    bits = ((byte.to(tl.int32) << (24 if HIGH else 28)) >> 6) & E2M1_IN_FLOAT32
    return bits.to(tl.float32, bitcast=True) * TWO_POW_126


@triton.jit
def decode_scale(scale, FORMAT: tl.constexpr):
    """A block's scale as stored -> float32, exact. e8m0: 2^(byte - 127), byte 255 is NaN."""
    if FORMAT == "nvfp4":
        return decode_e4m3(scale)
    elif FORMAT == "fp8_block_e8m0" or FORMAT == "mxfp8" or FORMAT == "mxfp4":
        bits = tl.where(scale == 0, 0x00400000, scale.to(tl.int32) << 23)  # 2^-127 is a float32 denormal
        return tl.where(scale == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        return scale


@triton.jit
def encode_e2m1(x):
    """float32 -> e2m1 code, the index of the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6; ties to even, NaN gives +6."""
    m = tl.abs(x)
    code = (m > 0.25).to(tl.int32) + (m >= 0.75).to(tl.int32) + (m > 1.25).to(tl.int32) + (m >= 1.75).to(tl.int32)
    code += (m > 2.5).to(tl.int32) + (m >= 3.5).to(tl.int32) + (m > 5.0).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 0x8
    return tl.where(x != x, 0x7, code | sign).to(tl.uint8)


@triton.jit
def encode_int8(x):
    """float32 -> int8 in [-127, 127], ties to even; NaN gives 0."""
    clamped = tl.minimum(tl.maximum(tl.where(x != x, 0.0, x), -127.0), 127.0)
    return ((clamped + ROUND_MAGIC) - ROUND_MAGIC).to(tl.int8)


# ---- block quantiser -------------------------------------------------------------------------------------------------


@triton.jit
def block_scale(amax, global_scale, FORMAT: tl.constexpr):
    """amax float32 [BLOCKS] -> (scale as stored, what to multiply the block with)."""
    if FORMAT == "fp8_block_e8m0" or FORMAT == "mxfp8" or FORMAT == "mxfp4":
        s = tl.math.div_rn(amax, tl.full(amax.shape, 6.0 if FORMAT == "mxfp4" else 448.0, tl.float32))
        bits = s.to(tl.int32, bitcast=True)
        byte = tl.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32), 254)
        # 2^(127 - byte); for byte 254 that is a float32 denormal.
        inverse = tl.where(byte == 254, 0x00400000, (254 - byte) << 23).to(tl.float32, bitcast=True)
        return byte.to(tl.uint8), inverse
    elif FORMAT == "nvfp4":
        limit = tl.full(amax.shape, 6.0, tl.float32) * global_scale
        scale = encode_e4m3(tl.math.div_rn(amax, limit))
        multiplier = decode_e4m3(scale) * global_scale
        inverse = tl.math.div_rn(tl.full(amax.shape, 1.0, tl.float32), multiplier)
        return scale, tl.where((scale & 0x7F) == 0, 0.0, inverse)  # -0, too
    else:
        limit = tl.full(amax.shape, 127.0 if FORMAT == "int8" else 448.0, tl.float32)
        scale = tl.math.div_rn(tl.maximum(amax, AMAX_MIN), limit)
        return scale, tl.math.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)


@triton.jit
def quantize_blocks(x, global_scale, FORMAT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """x float32 [BLOCKS, BLOCK] -> values [BLOCKS, BLOCK / pack], scale [BLOCKS] (to ignore for bf16 and fp16)."""
    if FORMAT == "bf16":
        return round_to(x, tl.bfloat16), tl.zeros([BLOCKS], tl.float32)
    elif FORMAT == "fp16":
        return round_to(x, tl.float16), tl.zeros([BLOCKS], tl.float32)
    else:
        amax = tl.minimum(tl.max(tl.where(x != x, 0.0, tl.abs(x)), axis=1), FLOAT32_MAX)
        scale, inverse = block_scale(amax, global_scale, FORMAT)
        scaled = x * inverse[:, None]
        if FORMAT == "int8":
            return encode_int8(scaled), scale
        elif FORMAT == "fp8_block" or FORMAT == "fp8_block_e8m0" or FORMAT == "mxfp8":
            return encode_e4m3(scaled), scale
        else:
            low, high = tl.split(tl.reshape(encode_e2m1(scaled), [BLOCKS, BLOCK // 2, 2]))
            return low | (high << 4), scale


@triton.jit
def store_blocks(
    values, scale, values_ptr, scale_ptr, row, chunk, k, stride_scale_row, stride_scale_k,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes chunk `chunk` of row `row` (int64) of values [rows, k / pack] and of its scale."""
    PACK: tl.constexpr = 2 if FORMAT == "mxfp4" or FORMAT == "nvfp4" else 1
    blocks = chunk * BLOCKS + tl.arange(0, BLOCKS)
    cols = blocks[:, None] * (BLOCK // PACK) + tl.arange(0, BLOCK // PACK)[None, :]
    tl.store(values_ptr + row * (k // PACK) + cols, values, mask=cols < k // PACK)
    if FORMAT != "bf16" and FORMAT != "fp16":
        scale_ptrs = scale_ptr + row * stride_scale_row + blocks.to(tl.int64) * stride_scale_k
        tl.store(scale_ptrs, scale, mask=(blocks == 0) | (blocks * BLOCK < k))  # int8 has one without columns, too


@triton.jit
def block_columns(chunk, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [BLOCKS, BLOCK] of a row's chunk."""
    return (chunk * BLOCKS + tl.arange(0, BLOCKS))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def expert_of_row(expert_offsets_ptr, row, num_experts, EXPERTS: tl.constexpr):
    """The expert whose range holds `row`; EXPERTS is num_experts rounded up to a power of two."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(expert_offsets_ptr + 1 + e, mask=e < num_experts, other=2147483647)
    return tl.sum((end <= row).to(tl.int32), axis=0)


@triton.jit
def load_global_scale(global_scale_ptr, expert_offsets_ptr, row, num_experts, EXPERTS: tl.constexpr):
    """1 if absent, else the one element, or with EXPERTS > 0 the element of the row's expert."""
    if global_scale_ptr is None:
        return 1.0
    elif EXPERTS == 0:
        return tl.load(global_scale_ptr)
    else:
        expert = expert_of_row(expert_offsets_ptr, row, num_experts, EXPERTS)
        return tl.load(global_scale_ptr + tl.minimum(expert, num_experts - 1))
