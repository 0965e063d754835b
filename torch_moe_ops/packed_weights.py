"""Weights with scales of a few values, in the order in which the SM90 kernels read them: 64 x 64 blocks, values and
scales side by side.

    packed [E, N/64, K/64, block]    for bf16 activations: uint8, 2048 bytes of values + 256 (nvfp4) or 128 (mxfp4) of
                                     scales, or 4096 + 128 (mxfp8)
                                     for fp8_block activations: int32, 512 + 32 words (mxfp4)

The numbers stay what they are, and so does the memory they take; `unpack_weight` gives them back. A block is what one
warpgroup multiplies by the tokens, as an operand in registers (PTX ISA, wgmma, matrix A in registers): thread t of 128
holds rows r = 16 (t/32) + t%32/4 and r + 8.

For bf16 activations a thread has of each 16 k those at 2c, 2c + 1, 2c + 8, 2c + 9 with c = t%4. Register j of four is
two values of row r + 8 (j%2), from k + 8 (j/2) on, one in each half.

4-bit values: [2 halves of 32 k][128 threads][2 steps of 16 k] words of 32 bits, each four registers. A bfloat16 with
e2m1's sign at bit 15 and its other bits at 8, 7 and 6 is that number times 2^-126, whether or not it is subnormal: the
word, rotated and masked, is the register. One rotation gives a register all of its bits, but register 3 needs two: four
times those four bits, rotated, cannot fill a word.

8-bit values: [2 halves of 32 k][128 threads][2 steps of 16 k][2] words, each two registers: register 2i has the upper
byte of each half of word i, register 2i + 1 the lower. A bfloat16 with e4m3's sign at bit 15 and its other bits at 10
to 4 is that number times 2^-120.

Scales: those of rows (r, r + 8) together, as bits that a shift turns into a bfloat16.
    nvfp4          [32 row pairs][2 pairs of steps][2 rows][2 steps], e4m3 with a wider exponent and without subnormals
    mxfp4, mxfp8   [32 row pairs][2 rows][2 halves of 32 k], the exponent's byte + 63, at most 255: infinity, from 2^65
                   on, and what a NaN of mxfp8 makes of its whole block of 32

For fp8_block activations a thread has of each 32 k those at 4c .. 4c + 3 and 16 + 4c .. 16 + 4c + 3, as e4m3: a value
times 2^(6 - d), where d is what its block's exponent lacks of its row's largest one. That is exact up to d = 11, where
e4m3's normal numbers end. The row's factor 2^(largest - 127 - 6) multiplies the sum.

Values: [2 halves of 32 k][128 threads][2 rows] words of eight codes V, in the order of k. The magnitude of V[i] is at
bits 4i to 4i + 2, the sign of V[j] at bit 8j + 7 and that of V[4 + j] at 8j + 3, for j = 0 .. 3: the low half of the
word, and the high one, have the selectors of a byte permutation that looks four magnitudes up.

Scales: [32 row pairs][2 rows][2 halves of 32 k] bytes, d in the lower four bits. Above it the first half has the lower
four bits, and the second the upper ones, of the row's largest exponent as its e8m0 byte: of all its blocks of 32 in K
that have a nonzero value, 127 if none has. The other blocks have d = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import CHUNK_ELEMENTS, FORMATS
from .meta_kernels._check import describe, refuse, storage_dtypes
from .scale_layouts import unpack

BLOCK = 64  # rows, and k
PACKABLE = ("nvfp4", "mxfp4", "mxfp8")
VALUE_BYTES = {format: BLOCK * BLOCK // FORMATS[format].pack for format in PACKABLE}
SCALE_BYTES = {format: BLOCK * BLOCK // FORMATS[format].weight_block[1] for format in PACKABLE}
BLOCK_BYTES = {format: VALUE_BYTES[format] + SCALE_BYTES[format] for format in PACKABLE}
# format -> the activations that there is a layout for -> its dtype, which tells it.
PACKED_DTYPES = {format: {"bf16": torch.uint8} for format in PACKABLE}
PACKED_DTYPES["mxfp4"]["fp8_block"] = torch.int32
# What fused_moe also quantises activations to in front of weights packed for bf16 ones. bf16 holds the numbers exactly,
# but for fp8_block's, which are rounded to it once more.
ROUNDED_ACTS = {
    "nvfp4": ("nvfp4", "fp8_block", "fp8_block_e8m0"),
    "mxfp4": ("mxfp4", "mxfp8", "fp8_block_e8m0"),
    "mxfp8": ("mxfp8",),
}

# Where a register has the bits of a code, lowest first, in its lower half.
REGISTER_BITS = (6, 7, 8, 15)
# How far to the left a word is rotated to bring each of them into place, of register j.
ROTATIONS = ((0, 0, 0, 0), (4, 4, 4, 4), (10, 10, 10, 10), (6, 14, 14, 14))

EXPONENT_SHIFT = 63
E4M3_NAN = 0x7F

MAX_DIFFERENCE = 11  # of the exponents of a row, where values become e4m3
NO_EXPONENT = 127  # the largest one of a row of zeros
E8M0_NAN = 0xFF


def pack_weight(values: Tensor, scale: Tensor, format: str, *, act_format: str = "bf16") -> Tensor:
    """values [E, N, K/pack] and scale [E, N, K / block_k] of nvfp4, mxfp4 or mxfp8 -> packed [E, N/64, K/64, block].

    A functional step for when weights are loaded: the result replaces both tensors (global scales stay as they are).
    It works through the experts in chunks.

    Args:
        values, scale: as `grouped_gemm` takes them, N and K multiples of 64.
        format: nvfp4, mxfp4 or mxfp8.
        act_format: of the activations that will multiply the weights: "bf16", or for mxfp4 also "fp8_block". Each has a
            layout of its own. That for "fp8_block" is read as e4m3 numbers and one exponent a row, so the exponents of
            a row may differ by at most 11 (blocks of zeros aside, whose scales, NaN as well, are not kept). To see
            whether they do, it synchronises with the host once a chunk.

    Returns:
        [E, N/64, K/64, block], a block for every 64 rows and 64 k: uint8, for fp8_block activations int32. The layouts
        stand in packed_weights.py.

    Raises:
        RuntimeError: ``pack_weight: argument: expected ..., got ...``: N or K is no multiple of 64, another format or
            act_format, shapes that do not fit together, or scales that e4m3 has no room for.
    """
    block_k = _block_k("pack_weight", format)
    if act_format not in PACKED_DTYPES[format]:
        refuse("pack_weight", "act_format", f"{' or '.join(PACKED_DTYPES[format])} for {format} weights", act_format)
    fmt = FORMATS[format]
    if values.dim() != 3 or values.dtype not in (*storage_dtypes(fmt.dtype), torch.uint8):
        columns = "K/2" if fmt.pack == 2 else "K"
        expected = f"{fmt.dtype} [E, N, {columns}]".removeprefix("torch.")
        refuse("pack_weight", "values", expected, describe(values.dtype, values.shape, values.device))
    num_experts, n, k = values.shape[0], values.shape[1], values.shape[2] * fmt.pack
    if n % BLOCK or k % BLOCK:
        refuse("pack_weight", "values", f"N and K to be multiples of {BLOCK}", f"N {n}, K {k}")
    shape = (num_experts, n, k // block_k)
    expected = describe(fmt.scale_dtype, shape, values.device)
    if scale is None:
        refuse("pack_weight", "scale", expected, None)
    dtypes = (*storage_dtypes(fmt.scale_dtype), torch.uint8)
    if scale.shape != shape or scale.dtype not in dtypes or scale.device != values.device:
        refuse("pack_weight", "scale", expected, describe(scale.dtype, scale.shape, scale.device))
    values, scale = values.view(torch.uint8), scale.view(torch.uint8)
    packed = values.new_empty((num_experts, n // BLOCK, k // BLOCK, BLOCK_BYTES[format]))
    step = max(1, CHUNK_ELEMENTS // max(1, n * k))
    for chunk in (slice(first, first + step) for first in range(0, num_experts, step)):
        codes = values[chunk]
        if fmt.pack == 2:
            codes = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
        if act_format == "fp8_block":
            packed[chunk] = _blocks_e4m3(codes, scale[chunk], chunk.start)
        else:
            packed[chunk] = _blocks_bf16(codes, scale[chunk], format)
    return packed.view(PACKED_DTYPES[format][act_format])


def unpack_weight(packed: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_weight`, for any activations.

    What a zero or negative nvfp4 scale multiplied comes back as numbers of the same value; mxfp4 and mxfp8 scales from
    2^65 on, which the kernels take for infinity, as NaN. Packed for fp8_block activations, scales from 2^65 on come
    back as they were, and those of blocks of zeros as the largest of their row.

    Args:
        packed: of `pack_weight`.
        format: of the weight: nvfp4, mxfp4 or mxfp8.

    Returns:
        values [E, N, K/pack] and scale [E, N, K / block_k], in the format's dtypes.

    Raises:
        RuntimeError: ``unpack_weight: argument: expected ..., got ...``
    """
    _block_k("unpack_weight", format)
    expect_packed("unpack_weight", "packed", packed, format)
    fmt = FORMATS[format]
    values, scales = packed.view(torch.uint8).tensor_split((VALUE_BYTES[format],), dim=-1)
    scale = _rows_of_scales(scales)
    if packed.dtype == torch.int32:
        codes = _codes_e4m3(values.contiguous().view(torch.int32))
        largest = scale[..., 0::2] >> 4 | scale[..., 1::2] & 0xF0
        scale = largest.repeat_interleave(2, dim=-1) - (scale & 0xF)
    else:
        codes = _codes(values.contiguous().view(torch.int32)) if fmt.pack == 2 else _codes_of_bytes(values)
        scale = _scales_stored(format).to(packed.device)[scale.int()]
    if fmt.pack == 2:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
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


def expect_packed(op: str, argument: str, packed: Tensor, format: str, act_format: str | None = None) -> None:
    """None: for any activations. Those that no layout is made for go with that for bf16."""
    dtypes, call = PACKED_DTYPES[format], "pack_weight"
    if act_format is not None and len(dtypes) > 1:
        act_format = act_format if act_format in dtypes else "bf16"
        dtypes, call = {act_format: dtypes[act_format]}, f'{call}(..., act_format="{act_format}")'
    has_blocks = packed.dim() == 4 and packed.shape[-1] * packed.dtype.itemsize == BLOCK_BYTES[format]
    if not (has_blocks and packed.dtype in dtypes.values() and packed.is_contiguous()):
        blocks = [
            f"{dtype} [E, N/{BLOCK}, K/{BLOCK}, {BLOCK_BYTES[format] // dtype.itemsize}]".removeprefix("torch.")
            for dtype in dtypes.values()
        ]
        expected = f"contiguous {' or '.join(blocks)} of {call}"
        refuse(op, argument, expected, describe(packed.dtype, packed.shape, packed.device))


def _block_k(op: str, format: str) -> int:
    if format not in SCALE_BYTES:
        refuse(op, "format", f"one of {', '.join(PACKABLE)}", format)
    return FORMATS[format].weight_block[1]


def _blocks_bf16(codes: Tensor, scale: Tensor, format: str) -> Tensor:
    """codes uint8 [E, N, K] and scale uint8 [E, N, K / block_k] -> [E, N/64, K/64, bytes]."""
    fmt, stored = FORMATS[format], _stored_scales(format).to(scale.device)[scale.int()]
    if format == "nvfp4":  # what the stored scale cannot say
        of_code = scale.repeat_interleave(fmt.weight_block[1], dim=-1)
        codes = torch.where(of_code & 0x7F == 0, 0, codes ^ (of_code >> 7 << 3))
    if format == "mxfp8":  # what the value's bits cannot say
        has_nan = (codes & 0x7F == E4M3_NAN).unflatten(-1, (-1, fmt.weight_block[1])).any(-1)
        stored = torch.where(has_nan, 255, stored)
    values = _words(codes).view(torch.uint8) if fmt.pack == 2 else _bytes(codes)
    return torch.cat((values.flatten(3), _scale_blocks(stored, codes.shape[2] // BLOCK)), dim=-1)


def _blocks_e4m3(codes: Tensor, scale: Tensor, first_expert: int) -> Tensor:
    """codes uint8 [E, N, K] and scale uint8 [E, N, K/32] of mxfp4 -> [E, N/64, K/64, bytes]."""
    k_blocks = codes.shape[2] // BLOCK
    largest, difference = _exponents(codes, scale, first_expert)
    values = _words_e4m3(codes).view(torch.uint8).flatten(3)
    upper = torch.stack((largest << 4, largest & 0xF0), dim=-1).repeat(1, 1, k_blocks)  # of both halves
    return torch.cat((values, _scale_blocks(difference | upper, k_blocks)), dim=-1)


def _exponents(codes: Tensor, scale: Tensor, first_expert: int) -> tuple[Tensor, Tensor]:
    """(the rows' largest exponents [E, N], what those of their blocks lack [E, N, K/32]), both uint8.

    Refuses what e4m3 cannot say; `first_expert` is the number of the first one here.
    """
    has_value = (codes & 7 != 0).unflatten(-1, (scale.shape[-1], -1)).any(-1)
    exponent = scale.short()
    largest = torch.where(has_value, exponent, -1).amax(-1)
    largest = torch.where(largest < 0, NO_EXPONENT, largest)
    difference = torch.where(has_value, largest[..., None] - exponent, 0)
    most = difference.amax(-1)
    refused = (most > MAX_DIFFERENCE) | (largest == E8M0_NAN)
    if refused.any():
        expert, row = refused.nonzero()[0].tolist()
        expected = f"exponents within {MAX_DIFFERENCE} of the largest in each row (e4m3 holds no more)"
        got = "NaN" if largest[expert, row] == E8M0_NAN else f"{most[expert, row]} less"
        refuse("pack_weight", "scale", expected, f"{got} in row {row} of expert {first_expert + expert}")
    return largest.byte(), difference.byte()


def _code_bits(register: int, half: int) -> tuple[int, ...]:
    """Which bits of a word are the bits of a register's code, lowest first."""
    rotations = ROTATIONS[register]
    return tuple((bit + 16 * half - rotation) % 32 for bit, rotation in zip(REGISTER_BITS, rotations, strict=True))


def _code_bits_e4m3(i: int) -> tuple[int, ...]:
    """The same of V[i]."""
    return (4 * i, 4 * i + 1, 4 * i + 2, 8 * i + 7 if i < 4 else 8 * (i - 4) + 3)


BITS = [_code_bits(register, half) for register in range(4) for half in range(2)]
BITS_E4M3 = [_code_bits_e4m3(i) for i in range(8)]


def _join(codes: Tensor, bits: list[tuple[int, ...]]) -> Tensor:
    """uint8 [8, ...] -> int32 [...]: words with each code's bits at its places."""
    words = torch.zeros(codes.shape[1:], dtype=torch.int32, device=codes.device)
    for code, positions in zip(codes, bits, strict=True):
        for i, position in enumerate(positions):
            words |= (code.int() >> i & 1) << position
    return words


def _split(words: Tensor, bits: list[tuple[int, ...]]) -> Tensor:
    """The inverse of `_join`."""
    codes = torch.empty((8, *words.shape), dtype=torch.uint8, device=words.device)
    for code, positions in zip(codes, bits, strict=True):
        code.copy_(sum((words >> position & 1) << i for i, position in enumerate(positions)))
    return codes


def _words(codes: Tensor) -> Tensor:
    """codes uint8 [E, N, K] -> int32 [E, N/64, K/64, 2 halves, 128 threads, 2 steps]."""
    num_experts, n, k = codes.shape
    codes = codes.view(num_experts, n // BLOCK, 4, 2, 8, k // BLOCK, 2, 2, 2, 4, 2)
    # eights of k, of rows, value; [E, N/64, K/64, half, warp, row, c, step]
    codes = codes.permute(8, 3, 10, 0, 1, 5, 6, 2, 4, 9, 7)
    return _join(codes.flatten(0, 2), BITS).flatten(4, 6)


def _codes(words: Tensor) -> Tensor:
    """The inverse of `_words`; its last three dimensions may be one."""
    num_experts, row_blocks, k_blocks = words.shape[:3]
    codes = _split(words.reshape(num_experts, row_blocks, k_blocks, 2, 4, 8, 4, 2), BITS).unflatten(0, (2, 2, 2))
    codes = codes.permute(3, 4, 7, 1, 8, 5, 6, 10, 0, 9, 2)
    return codes.reshape(num_experts, row_blocks * BLOCK, k_blocks * BLOCK)


def _words_e4m3(codes: Tensor) -> Tensor:
    """codes uint8 [E, N, K] -> int32 [E, N/64, K/64, 2 halves, 128 threads, 2 rows]."""
    num_experts, n, k = codes.shape
    codes = codes.view(num_experts, n // BLOCK, 4, 2, 8, k // BLOCK, 2, 2, 4, 4)
    # sixteens of k, value; [E, N/64, K/64, half, warp, row, c, eights of rows]
    codes = codes.permute(7, 9, 0, 1, 5, 6, 2, 4, 8, 3)
    return _join(codes.flatten(0, 1), BITS_E4M3).flatten(4, 6)


def _codes_e4m3(words: Tensor) -> Tensor:
    """The inverse of `_words_e4m3`; its last three dimensions may be one."""
    num_experts, row_blocks, k_blocks = words.shape[:3]
    codes = _split(words.reshape(num_experts, row_blocks, k_blocks, 2, 4, 8, 4, 2), BITS_E4M3).unflatten(0, (2, 4))
    codes = codes.permute(2, 3, 6, 9, 7, 4, 5, 0, 8, 1)
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
    byte = torch.arange(256, device="cpu")
    if format != "nvfp4":
        return (byte + EXPONENT_SHIFT).clamp(max=255).to(torch.uint8)
    byte = byte & 0x7F
    # Exponent fields begin at 4 for e4m3's normal numbers and at 1 for its smallest subnormal; 31 keeps NaN.
    subnormal = torch.tensor([0, 8, 16, 20, 24, 26, 28, 30], device="cpu")[byte & 7]
    stored = torch.where(byte < 8, subnormal, byte + (3 << 3))
    return torch.where(byte == 0x7F, 0xFF, stored).to(torch.uint8)


def _scales_stored(format: str) -> Tensor:
    """The inverse of `_stored_scales`."""
    table = torch.zeros(256, dtype=torch.uint8, device="cpu")
    count = 128 if format == "nvfp4" else 256
    table[_stored_scales(format)[:count].long()] = torch.arange(count, dtype=torch.uint8, device="cpu")
    return table
