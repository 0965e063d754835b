"""Weights with scales of a few values, in the order in which the SM90 kernels read them: 64 x 64 blocks, values and
scales side by side.

    packed uint8 [E, N/64, K/64, bytes]    bytes = 2048 of values + 256 (nvfp4) or 128 (mxfp4) of scales, or 4096 + 128
                                           (mxfp8)

The numbers stay what they are, and so does the memory they take; `unpack_weight` gives them back. A block is what one
warpgroup multiplies by the tokens, as an operand in registers: thread t of 128 holds rows r = 16 (t/32) + t%32/4 and
r + 8, and of each 16 k those at 2c, 2c + 1, 2c + 8, 2c + 9 with c = t%4 (PTX ISA, wgmma, matrix A in registers).
Register j of four is two values of row r + 8 (j%2), from k + 8 (j/2) on, one in each half.

4-bit values: [2 halves of 32 k][128 threads][2 steps of 16 k] words of 32 bits, each four registers. A bfloat16 with
e2m1's sign at bit 15 and its other bits at 8, 7 and 6 is that number times 2^-126, whether or not it is subnormal: a
shift and a mask of the word give the register. Of all arrangements with a shift for a register's magnitudes and one for
its signs, this needs the fewest.

8-bit values: [2 halves of 32 k][128 threads][2 steps of 16 k][2] words, each two registers: register 2i has the upper
byte of each half of word i, register 2i + 1 the lower. A bfloat16 with e4m3's sign at bit 15 and its other bits at 10
to 4 is that number times 2^-120.

Scales: those of rows (r, r + 8) together, as bits that a shift turns into a bfloat16.
    nvfp4          [32 row pairs][2 pairs of steps][2 rows][2 steps], e4m3 with a wider exponent and without subnormals
    mxfp4, mxfp8   [32 row pairs][2 rows][2 halves of 32 k], the exponent's byte + 63, at most 255: infinity, from 2^65
                   on, and what a NaN of mxfp8 makes of its whole block of 32
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import CHUNK_ELEMENTS, FORMATS
from .meta_kernels._check import describe, refuse
from .scale_layouts import unpack

BLOCK = 64  # rows, and k
PACKABLE = ("nvfp4", "mxfp4", "mxfp8")
VALUE_BYTES = {format: BLOCK * BLOCK // FORMATS[format].pack for format in PACKABLE}
SCALE_BYTES = {format: BLOCK * BLOCK // FORMATS[format].weight_block[1] for format in PACKABLE}

# Left shift of a word that brings the magnitudes, and the signs, of register j into place.
MAGNITUDE_SHIFTS = (0, 3, 6, -3)
SIGN_SHIFTS = (0, 3, 1, 2)
# Where a register has the bits of a code, lowest first, in its lower half.
REGISTER_BITS = (6, 7, 8, 15)

EXPONENT_SHIFT = 63
E4M3_NAN = 0x7F


def pack_weight(values: Tensor, scale: Tensor, format: str) -> Tensor:
    """values [E, N, K/pack] and scale [E, N, K / block_k] of nvfp4, mxfp4 or mxfp8 -> packed [E, N/64, K/64, bytes].

    A functional step for when weights are loaded: the result replaces both tensors (global scales stay as they are).
    It works through the experts in chunks.

    Raises:
        RuntimeError: N or K is no multiple of 64, another format, or shapes that do not fit together.
    """
    block_k = _block_k("pack_weight", format)
    fmt = FORMATS[format]
    if values.dim() != 3 or values.element_size() != 1:
        columns = "K/2" if fmt.pack == 2 else "K"
        expected = f"{fmt.dtype} [E, N, {columns}]".removeprefix("torch.")
        refuse("pack_weight", "values", expected, describe(values.dtype, values.shape, values.device))
    num_experts, n, k = values.shape[0], values.shape[1], values.shape[2] * fmt.pack
    if n % BLOCK or k % BLOCK:
        refuse("pack_weight", "values", f"N and K to be multiples of {BLOCK}", f"N {n}, K {k}")
    shape = (num_experts, n, k // block_k)
    if scale.shape != shape or scale.element_size() != 1 or scale.device != values.device:
        expected = describe(fmt.scale_dtype, shape, values.device)
        refuse("pack_weight", "scale", expected, describe(scale.dtype, scale.shape, scale.device))
    values, scale = values.view(torch.uint8), scale.view(torch.uint8)
    value_bytes = VALUE_BYTES[format]
    packed = values.new_empty((num_experts, n // BLOCK, k // BLOCK, value_bytes + SCALE_BYTES[format]))
    table, step = _stored_scales(format).to(scale.device), max(1, CHUNK_ELEMENTS // max(1, n * k))
    for chunk in (slice(first, first + step) for first in range(0, num_experts, step)):
        codes, stored = values[chunk], table[scale[chunk].int()]
        if fmt.pack == 2:
            codes = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
        if format == "nvfp4":  # what the stored scale cannot say
            of_code = scale[chunk].repeat_interleave(block_k, dim=-1)
            codes = torch.where(of_code & 0x7F == 0, 0, codes ^ (of_code >> 7 << 3))
        if format == "mxfp8":  # what the value's bits cannot say
            has_nan = (codes & 0x7F == E4M3_NAN).unflatten(-1, (-1, block_k)).any(-1)
            stored = torch.where(has_nan, 255, stored)
        blocks = _words(codes).view(torch.uint8) if fmt.pack == 2 else _bytes(codes)
        packed[chunk, ..., :value_bytes] = blocks.flatten(3)
        packed[chunk, ..., value_bytes:] = _scale_blocks(stored, k // BLOCK)
    return packed


def unpack_weight(packed: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_weight`: (values [E, N, K/pack], scale [E, N, K / block_k]) in the format's dtypes.

    What a zero or negative nvfp4 scale multiplied, and mxfp4 and mxfp8 scales from 2^65 on, come back as numbers of the
    same value (infinity for the latter).
    """
    _block_k("unpack_weight", format)
    expect_packed("unpack_weight", "packed", packed, format)
    fmt, value_bytes = FORMATS[format], VALUE_BYTES[format]
    blocks = packed[..., :value_bytes]
    if fmt.pack == 2:
        codes = _codes(blocks.contiguous().view(torch.int32))
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    else:
        codes = _codes_of_bytes(blocks)
    scale = _scales_stored(format).to(packed.device)[_rows_of_scales(packed[..., value_bytes:]).int()]
    return codes.view(fmt.dtype), scale.view(fmt.scale_dtype)


def is_packed(weight: Tensor) -> bool:
    """Whether a weight argument of `grouped_gemm` or `fused_moe` is the result of `pack_weight`."""
    return weight.dim() == 4


def weight_sizes(weight: Tensor, format: str) -> tuple[int, int, int]:
    """(E, N, K) of a weight [E, N, K/pack], or packed; K counts values."""
    unit_n, unit_k = (BLOCK, BLOCK) if is_packed(weight) else (1, FORMATS[format].pack)
    return weight.shape[0], weight.shape[1] * unit_n, weight.shape[2] * unit_k


def has_scale_atoms(scale: Tensor | None) -> bool:
    """Whether a weight's scale [E, N, columns] is given as `pack_scale` lays it out in atoms."""
    return scale is not None and scale.dim() == 6


def as_stored(weight: Tensor, scale: Tensor | None, format: str) -> tuple[Tensor, Tensor | None]:
    """A weight argument and its scale, unpacked if they are packed."""
    if is_packed(weight):
        return unpack_weight(weight, format)
    if has_scale_atoms(scale):
        _, n, k = weight_sizes(weight, format)
        scale = unpack(scale, "atom", n, FORMATS[format].weight_scale_shape(n, k)[1], scale.dtype, None)
    return weight, scale


def expect_packed(op: str, argument: str, packed: Tensor, format: str) -> None:
    size = VALUE_BYTES[format] + SCALE_BYTES[format]
    if packed.dim() != 4 or packed.dtype != torch.uint8 or packed.shape[-1] != size or not packed.is_contiguous():
        expected = f"contiguous uint8 [E, N/{BLOCK}, K/{BLOCK}, {size}] of pack_weight"
        refuse(op, argument, expected, describe(packed.dtype, packed.shape, packed.device))


def _block_k(op: str, format: str) -> int:
    if format not in SCALE_BYTES:
        refuse(op, "format", f"one of {', '.join(PACKABLE)}", format)
    return FORMATS[format].weight_block[1]


def _code_bits(register: int, half: int) -> tuple[int, ...]:
    """Which bits of a word are the bits of a register's code, lowest first."""
    shifts = (MAGNITUDE_SHIFTS[register],) * 3 + (SIGN_SHIFTS[register],)
    return tuple(bit + 16 * half - shift for bit, shift in zip(REGISTER_BITS, shifts, strict=True))


def _words(codes: Tensor) -> Tensor:
    """codes uint8 [E, N, K] -> int32 [E, N/64, K/64, 2 halves, 128 threads, 2 steps]."""
    num_experts, n, k = codes.shape
    codes = codes.view(num_experts, n // BLOCK, 4, 2, 8, k // BLOCK, 2, 2, 2, 4, 2)
    # eights of k, of rows, value; [E, N/64, K/64, half, warp, row, c, step]
    codes = codes.permute(8, 3, 10, 0, 1, 5, 6, 2, 4, 9, 7)
    words = torch.zeros(codes.shape[3:], dtype=torch.int32, device=codes.device)
    for register in range(4):
        for half in range(2):
            code = codes[register // 2, register % 2, half].int()
            for bit, position in enumerate(_code_bits(register, half)):
                words |= (code >> bit & 1) << position
    return words.flatten(4, 6)


def _codes(words: Tensor) -> Tensor:
    """The inverse of `_words`; its last three dimensions may be one."""
    num_experts, row_blocks, k_blocks = words.shape[:3]
    words = words.reshape(num_experts, row_blocks, k_blocks, 2, 4, 8, 4, 2)
    codes = torch.empty((2, 2, 2, *words.shape), dtype=torch.uint8, device=words.device)
    for register in range(4):
        for half in range(2):
            bits = (words >> position & 1 for position in _code_bits(register, half))
            codes[register // 2, register % 2, half] = sum(bit << i for i, bit in enumerate(bits))
    codes = codes.permute(3, 4, 7, 1, 8, 5, 6, 10, 0, 9, 2)
    return codes.reshape(num_experts, row_blocks * BLOCK, k_blocks * BLOCK)


def _bytes(codes: Tensor) -> Tensor:
    """codes uint8 [E, N, K] -> uint8 [E, N/64, K/64, 2 halves, 128 threads, 2 steps, 8]."""
    num_experts, n, k = codes.shape
    codes = codes.view(num_experts, n // BLOCK, 4, 2, 8, k // BLOCK, 2, 2, 2, 4, 2)
    # [E, N/64, K/64, half, warp, row, c, step, eights of k, value, eights of rows], the second eight in the lower byte
    return codes.permute(0, 1, 5, 6, 2, 4, 9, 7, 8, 10, 3).flip(-1).flatten(8).flatten(4, 6)


def _codes_of_bytes(blocks: Tensor) -> Tensor:
    """The inverse of `_bytes`; its last four dimensions may be one."""
    num_experts, row_blocks, k_blocks = blocks.shape[:3]
    codes = blocks.reshape(num_experts, row_blocks, k_blocks, 2, 4, 8, 4, 2, 2, 2, 2).flip(-1)
    codes = codes.permute(0, 1, 4, 10, 5, 2, 3, 7, 8, 6, 9)
    return codes.reshape(num_experts, row_blocks * BLOCK, k_blocks * BLOCK)


def _scale_blocks(stored: Tensor, k_blocks: int) -> Tensor:
    """uint8 [E, N, K / block_k] -> [E, N/64, K/64, bytes]."""
    num_experts, n, columns = stored.shape
    stored = stored.view(num_experts, n // BLOCK, 4, 2, 8, k_blocks, columns // k_blocks // 2, 2)
    return stored.permute(0, 1, 5, 2, 4, 6, 3, 7).reshape(num_experts, n // BLOCK, k_blocks, -1)


def _rows_of_scales(blocks: Tensor) -> Tensor:
    """The inverse of `_scale_blocks`."""
    num_experts, row_blocks, k_blocks, size = blocks.shape
    blocks = blocks.reshape(num_experts, row_blocks, k_blocks, 4, 8, size // 128, 2, 2)
    return blocks.permute(0, 1, 3, 6, 4, 2, 5, 7).reshape(num_experts, row_blocks * BLOCK, -1)


def _stored_scales(format: str) -> Tensor:
    """What is stored for each byte of a scale; nvfp4's lower seven bits alone."""
    byte = torch.arange(256)
    if format != "nvfp4":
        return (byte + EXPONENT_SHIFT).clamp(max=255).to(torch.uint8)
    byte = byte & 0x7F
    # Exponent fields begin at 4 for e4m3's normal numbers and at 1 for its smallest subnormal; 31 keeps NaN.
    subnormal = torch.tensor([0, 8, 16, 20, 24, 26, 28, 30])[byte & 7]
    stored = torch.where(byte < 8, subnormal, byte + (3 << 3))
    return torch.where(byte == 0x7F, 0xFF, stored).to(torch.uint8)


def _scales_stored(format: str) -> Tensor:
    """The inverse of `_stored_scales`."""
    table = torch.zeros(256, dtype=torch.uint8)
    count = 128 if format == "nvfp4" else 256
    table[_stored_scales(format)[:count].long()] = torch.arange(count, dtype=torch.uint8)
    return table
