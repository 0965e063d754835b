"""How numbers are stored: x ~= value * scale * global_scale.

A `Format` says which type holds a value, which type holds a scale, and which block of a [rows, k] matrix shares one
scale. Its `quantize` and `dequantize` are the definition that every kernel of this package reproduces bit for bit
(see "Formats" in docs/ops.md).

Layouts, for x [..., rows, k]:
    values [..., rows, k / pack]      the 4-bit formats keep two values in a uint8, low nibble = even k
    scale  [..., parts * ceil(rows / parts / block_rows), ceil(k / block_k)]
`parts` equally tall matrices may lie on top of each other (gate over up in w13): blocks and global scales are counted
within each of them.

All arithmetic is plain elementwise float32 torch, so CPU and CUDA give the same bits. One trap decides how divisions
are written here: CUDA torch turns `tensor / number` into a multiplication by the rounded reciprocal; `tensor / tensor`
is the IEEE division.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

# (rows, k) that share a scale; None instead of a number is the whole extent.
Block = tuple[int | None, int | None]

E2M1_MAX = 6.0
E4M3_MAX = 448.0
FLOAT32_MAX = torch.finfo(torch.float32).max
# Keeps the scale of an all-zero block, and with it 1/scale, finite (float32-scaled formats).
AMAX_MIN = 1e-10
# Elements that `quantize_weight` holds in float32 at a time.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Format:
    """One way of storing numbers. Only its name crosses op schemas."""

    name: str
    dtype: torch.dtype  # of the stored values; uint8 holds two e2m1 codes
    max_value: float  # largest finite magnitude of a value
    scale_dtype: torch.dtype
    act_block: Block | None  # None: no scale at all
    weight_block: Block | None
    pack: int = 1  # values per stored element
    has_global_scale: bool = False

    @property
    def has_scale(self) -> bool:
        return self.act_block is not None

    def act_scale_shape(self, rows: int, k: int) -> tuple[int, int]:
        """Shape of the scale of activations [rows, k]; k counts values, not stored elements."""
        return _scale_shape(rows, k, self.act_block, 1)

    def weight_scale_shape(self, n: int, k: int, parts: int = 1) -> tuple[int, int]:
        """Shape of the scale of one expert's weight [n, k], n = parts * the height of a part."""
        return _scale_shape(n, k, self.weight_block, parts)

    def quantize(
        self, x: Tensor, block: Block | None, global_scale: Tensor | None = None, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """x [..., rows, k] -> (values, scale). `block` is `act_block` or `weight_block`.

        `global_scale` (float32): one element, [...] (the leading dimensions of x) or [..., parts].
        """
        if block is None:
            return x.to(self.dtype, copy=True), x.new_empty((*x.shape[:-1], 0), dtype=torch.float32)
        if x.shape[-1] % self.pack:
            raise RuntimeError(f"quantize: input: expected an even last dimension for {self.name}, got {list(x.shape)}")
        rows, k = x.shape[-2:]
        blocks = _to_blocks(x.float(), block, parts)  # [..., parts, row blocks, block rows, k blocks, block k]
        amax = _amax(blocks, (-3, -1))  # [..., parts, row blocks, k blocks]
        global_scale = self._broadcast_global_scale(global_scale, amax, parts)
        scale = self._encode_scale(amax, global_scale)
        decoded = decode_scale(scale)
        inverse = torch.where(decoded == 0, 0.0, (decoded * global_scale).reciprocal())
        scaled = _from_blocks(blocks * inverse[..., :, None, :, None], rows, k)
        return self._encode(scaled), scale.flatten(-3, -2)

    def dequantize(
        self, values: Tensor, scale: Tensor, block: Block | None, global_scale: Tensor | None = None, parts: int = 1
    ) -> Tensor:
        """(values, scale) -> float32 [..., rows, k]: (value * scale) * global_scale, rounded after each product."""
        x = unpack_e2m1(values) if self.pack == 2 else values.float()
        if block is None:
            return x
        rows, k = x.shape[-2:]
        blocks = _to_blocks(x, block, parts)
        scale = decode_scale(scale).unflatten(-2, (parts, scale.shape[-2] // parts))
        blocks = blocks * scale[..., :, None, :, None]
        if self.has_global_scale:
            blocks = blocks * self._broadcast_global_scale(global_scale, scale, parts)[..., None, None]
        return _from_blocks(blocks, rows, k)

    def _encode_scale(self, amax: Tensor, global_scale: Tensor) -> Tensor:
        """amax [..., parts, row blocks, k blocks], not NaN -> the stored scale of the same shape."""
        limit = self.max_value * global_scale
        if self.scale_dtype == torch.float8_e8m0fnu:
            return encode_e8m0(amax / limit)
        if self.scale_dtype == torch.float8_e4m3fn:
            return encode_e4m3(amax / limit)
        return amax.clamp(min=AMAX_MIN) / limit

    def _broadcast_global_scale(self, global_scale: Tensor | None, scale: Tensor, parts: int) -> Tensor:
        """-> float32 that broadcasts against scale [..., parts, row blocks, k blocks]; 1, an identity, if absent."""
        if global_scale is None:
            return scale.new_ones((1, 1))
        if not self.has_global_scale:
            raise RuntimeError(f"quantize: global_scale: expected none for {self.name}, got {list(global_scale.shape)}")
        if global_scale.numel() == 1:
            return global_scale.float().reshape(1, 1)
        lead = scale.shape[:-3]
        per_part = global_scale.unsqueeze(-1) if global_scale.shape == lead else global_scale
        if per_part.shape not in ((*lead, 1), (*lead, parts)):
            expected = f"1 element, {list(lead)} or {[*lead, parts]}"
            raise RuntimeError(f"quantize: global_scale: expected {expected}, got {list(global_scale.shape)}")
        return per_part.float()[..., None, None]

    def _encode(self, x: Tensor) -> Tensor:
        """float32 already divided by its scale -> stored values, saturating, ties to even."""
        if self.pack == 2:
            return pack_e2m1(encode_e2m1(x))
        if self.dtype == torch.int8:
            x = torch.where(x.isnan(), 0.0, x)
            return x.round().clamp(-self.max_value, self.max_value).to(torch.int8)
        return encode_e4m3(x)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("bf16", torch.bfloat16, torch.finfo(torch.bfloat16).max, torch.float32, None, None),
        Format("fp16", torch.float16, torch.finfo(torch.float16).max, torch.float32, None, None),
        Format("int8", torch.int8, 127.0, torch.float32, (1, None), (1, None)),
        Format("fp8_block", torch.float8_e4m3fn, E4M3_MAX, torch.float32, (1, 128), (128, 128)),
        Format("fp8_block_e8m0", torch.float8_e4m3fn, E4M3_MAX, torch.float8_e8m0fnu, (1, 128), (128, 128)),
        Format("mxfp8", torch.float8_e4m3fn, E4M3_MAX, torch.float8_e8m0fnu, (1, 32), (1, 32)),
        Format("mxfp4", torch.uint8, E2M1_MAX, torch.float8_e8m0fnu, (1, 32), (1, 32), pack=2),
        Format("nvfp4", torch.uint8, E2M1_MAX, torch.float8_e4m3fn, (1, 16), (1, 16), pack=2, has_global_scale=True),
    )
}


def get_format(op: str, name: str) -> Format:
    """The format called `name`, or a one-line error that names the op."""
    if name not in FORMATS:
        raise RuntimeError(f"{op}: format: expected one of {', '.join(FORMATS)}, got {name}")
    return FORMATS[name]


@torch.no_grad()
def quantize_weight(
    weight: Tensor, format: str | Format, *, parts: int = 1, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """weight [E, N, K] ~= values * scale * global_scale, rounded as `quantize` of the format's weight blocks.

    nvfp4 takes amax / (6 * 448) of each expert and part as global scale (the largest block scale is then 448), unless
    one is given.
    Works through the experts in chunks, so a layer never exists in float32.

    Args:
        weight: [E, N, K], bfloat16, float16 or float32.
        format: a name in `FORMATS`, or one of its values.
        parts: that many equally tall matrices lie on top of each other (2 for w13): blocks are counted within each.
        global_scale: nvfp4: float32, one for all, [E] or [E, parts], positive; None: computed.
    Returns:
        values [E, N, K/pack] (bf16 and fp16: the weight itself if it has that dtype), scale in the layout of
        "Formats" in ops.md or None, global_scale float32 [E, parts] or None.
    Raises:
        RuntimeError: ``quantize_weight: argument: expected ..., got ...``.
    """
    fmt = format if isinstance(format, Format) else get_format("quantize_weight", format)
    _expect_weight("quantize_weight", "weight", weight)
    if weight.dim() != 3:
        raise RuntimeError(f"quantize_weight: weight: expected [E, N, K], got {list(weight.shape)}")
    num_experts, n, k = weight.shape
    if parts < 1 or n % parts:
        raise RuntimeError(f"quantize_weight: parts: expected a divisor of {n} rows, got {parts}")
    if k % fmt.pack:
        raise RuntimeError(f"quantize_weight: weight: expected an even K for {fmt.name}, got {list(weight.shape)}")
    if global_scale is not None:
        global_scale = _global_scale_of_parts(fmt, global_scale, weight, parts)
    if not fmt.has_scale:
        return weight.to(fmt.dtype), None, None
    values = weight.new_empty((num_experts, n, k // fmt.pack), dtype=fmt.dtype)
    scale = weight.new_empty((num_experts, *fmt.weight_scale_shape(n, k, parts)), dtype=fmt.scale_dtype)
    given = global_scale
    if fmt.has_global_scale and given is None:
        global_scale = weight.new_empty((num_experts, parts), dtype=torch.float32)
    step = max(1, CHUNK_ELEMENTS // max(1, n * k))
    for chunk in (slice(first, first + step) for first in range(0, num_experts, step)):
        if fmt.has_global_scale and given is None:
            global_scale[chunk] = compute_global_scale(weight[chunk], parts=parts)
        chunk_global = None if global_scale is None else global_scale[chunk]
        values[chunk], scale[chunk] = fmt.quantize(weight[chunk], fmt.weight_block, chunk_global, parts)
    return values, scale, global_scale


@torch.no_grad()
def compute_global_scale(x: Tensor, *, parts: int = 1) -> Tensor:
    """nvfp4's global scale for x [..., rows, k], float32 [..., parts]: amax / (6 * 448), and 1 where x is all zero.

    The largest block scale is then 448, the end of e4m3's range. For weights, and for a calibration batch of
    activations: computed anew in each call, it would make a token's result depend on the other tokens.

    Args:
        x: [..., rows, k], bfloat16, float16 or float32.
        parts: that many equally tall matrices lie on top of each other, each with a global scale of its own.
    Returns:
        float32 [..., parts].
    Raises:
        RuntimeError: ``compute_global_scale: x: expected ..., got ...``.
    """
    _expect_weight("compute_global_scale", "x", x)
    if x.dim() < 2 or parts < 1 or x.shape[-2] % parts:
        raise RuntimeError(f"compute_global_scale: x: expected [..., a multiple of {parts}, k], got {list(x.shape)}")
    if x.numel() == 0:
        return x.new_ones((*x.shape[:-2], parts), dtype=torch.float32)
    amax = _amax(x.float().unflatten(-2, (parts, x.shape[-2] // parts)), (-2, -1))
    global_scale = amax / amax.new_full((), E2M1_MAX * E4M3_MAX)
    return torch.where(global_scale > 0, global_scale, 1.0)


def _expect_weight(function: str, name: str, x: Tensor) -> None:
    got = getattr(x, "dtype", x)
    if got not in (torch.bfloat16, torch.float16, torch.float32):
        raise RuntimeError(
            f"{function}: {name}: expected bfloat16, float16 or float32, got {got}".replace("torch.", "")
        )


def _global_scale_of_parts(fmt: Format, global_scale: Tensor, weight: Tensor, parts: int) -> Tensor:
    """As it is given -> [E, parts]."""

    def refuse(expected: str, got: object) -> NoReturn:
        raise RuntimeError(f"quantize_weight: global_scale: expected {expected}, got {got}".replace("torch.", ""))

    num_experts = len(weight)
    if not isinstance(global_scale, Tensor):
        refuse("a tensor", global_scale)
    if not fmt.has_global_scale:
        refuse(f"none for {fmt.name}", list(global_scale.shape))
    if global_scale.dtype != torch.float32 or global_scale.device != weight.device:
        refuse(f"float32 on {weight.device}", f"{global_scale.dtype} on {global_scale.device}")
    if global_scale.numel() != 1 and global_scale.shape not in ((num_experts,), (num_experts, parts)):
        refuse(f"one element, [{num_experts}] or [{num_experts}, {parts}]", list(global_scale.shape))
    if global_scale.device.type == "cpu" and not (global_scale > 0).all():
        refuse("positive values", global_scale.min().item())
    per_expert = global_scale.reshape(1, 1) if global_scale.numel() == 1 else global_scale.reshape(num_experts, -1)
    return per_expert.expand(num_experts, parts).contiguous()


# ---- number types ----------------------------------------------------------------------------------------------------


def encode_e4m3(x: Tensor) -> Tensor:
    """float32 -> float8_e4m3fn: saturating (inf gives 448), ties to even, NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def encode_e8m0(x: Tensor) -> Tensor:
    """Non-negative float32 -> float8_e8m0fnu (2^(byte - 127), byte at most 254): the next power of two, rounded up."""
    bits = x.contiguous().view(torch.int32)
    byte = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return byte.clamp(max=254).to(torch.uint8).view(torch.float8_e8m0fnu)


def decode_scale(scale: Tensor) -> Tensor:
    """Any stored scale -> float32, exact. e8m0: 2^(byte - 127), byte 255 is NaN."""
    if scale.dtype != torch.float8_e8m0fnu:
        return scale.float()
    byte = scale.view(torch.uint8).to(torch.int32)
    bits = byte << 23
    bits = torch.where(byte == 0, 0x00400000, bits)  # 2^-127 is a float32 denormal
    bits = torch.where(byte == 255, 0x7FC00000, bits)
    return bits.view(torch.float32)


def encode_e2m1(x: Tensor) -> Tensor:
    """float32 -> 4-bit codes in uint8: sign, then the index of the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6.

    A tie goes to the even code, so the midpoints below codes 2, 4 and 6 belong to them. Saturating; NaN gives 0x7 (+6),
    as the hardware does.
    """
    m = x.abs()
    code = (m > 0.25).to(torch.uint8)
    for is_above in (m >= 0.75, m > 1.25, m >= 1.75, m > 2.5, m >= 3.5, m > 5.0):
        code += is_above
    code |= x.signbit().to(torch.uint8) << 3
    return torch.where(x.isnan(), 0x7, code)


def decode_e2m1(code: Tensor) -> Tensor:
    """4-bit codes in uint8 -> float32. The eight magnitudes are convex in the code: the maximum of three lines."""
    index = (code & 0x7).float()
    magnitude = torch.maximum(torch.maximum(index * 0.5, index - 2.0), index * 2.0 - 8.0)
    return torch.where(code >= 8, -magnitude, magnitude)


def pack_e2m1(code: Tensor) -> Tensor:
    """codes uint8 [..., k] -> [..., k/2], low nibble = even k."""
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """uint8 [..., k/2] -> float32 [..., k]."""
    return decode_e2m1(torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2))


# ---- blocks ----------------------------------------------------------------------------------------------------------


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _scale_shape(rows: int, k: int, block: Block | None, parts: int) -> tuple[int, int]:
    if block is None:
        return rows, 0
    part_rows = rows // parts
    block_rows, block_k = block
    row_blocks = 1 if block_rows is None else ceil_div(part_rows, block_rows)
    return parts * row_blocks, 1 if block_k is None else ceil_div(k, block_k)


def _amax(x: Tensor, dims: tuple[int, int]) -> Tensor:
    """The largest |x|, NaN ignored, infinity clamped to the largest float32."""
    return torch.where(x.isnan(), 0.0, x.abs()).amax(dims).clamp(max=FLOAT32_MAX)


def _to_blocks(x: Tensor, block: Block, parts: int) -> Tensor:
    """[..., rows, k] -> [..., parts, row blocks, block rows, k blocks, block k]; zero-padded when ragged."""
    rows, k = x.shape[-2:]
    if rows % parts:
        raise RuntimeError(f"quantize: parts: expected a divisor of {rows} rows, got {parts}")
    part_rows = rows // parts
    block_rows, block_k = block[0] or part_rows, block[1] or max(k, 1)
    row_blocks, k_blocks = ceil_div(part_rows, block_rows), 1 if block[1] is None else ceil_div(k, block_k)
    x = x.unflatten(-2, (parts, part_rows))
    ragged_k, ragged_rows = k_blocks * block_k - k, row_blocks * block_rows - part_rows
    if ragged_k or ragged_rows:
        x = torch.nn.functional.pad(x, (0, ragged_k, 0, ragged_rows))
    return x.unflatten(-1, (k_blocks, block_k)).unflatten(-3, (row_blocks, block_rows))


def _from_blocks(blocks: Tensor, rows: int, k: int) -> Tensor:
    """The inverse of `_to_blocks`, contiguous."""
    parts = blocks.shape[-5]
    x = blocks.flatten(-2).flatten(-3, -2)  # [..., parts, padded part rows, padded k]
    return x[..., : rows // parts, :k].flatten(-3, -2).contiguous()
