"""Oracles from C++ on a CPU (torch_moe_ops._host): CuTe's layout of block scales, and the device code of the CUDA
quantisers and of pack_scale, against the reference. Skipped where the build found no pybind11."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS
from torch_moe_ops.packed_weights import BITS, REGISTER_BITS, ROUNDED_ACTS
from torch_moe_ops.scale_layouts import SCALE_LAYOUTS

host = pytest.importorskip("torch_moe_ops._host", reason="needs the optional module, which is built with pybind11")

# (rows, columns) of scales; whole atoms and ragged ones, several in both directions.
SHAPES = [(1, 1), (128, 4), (128, 28), (130, 7), (256, 100), (300, 33), (640, 112)]


def offsets(data: bytes, rows: int, columns: int) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int32).view(rows, columns).long()


def atoms_by_offsets(scale: Tensor, where: Tensor, size: int) -> Tensor:
    storage = torch.zeros(size, dtype=torch.uint8)
    storage[where.flatten()] = scale.flatten()
    return storage


@pytest.mark.parametrize("block_k", [16, 32])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_s2_4_atoms_are_those_of_cute(block_k: int, rows: int, columns: int) -> None:
    scale = torch.randint(1, 256, (rows, columns)).to(torch.uint8)
    where = offsets(host.cute_scale_offsets(block_k, rows, columns), rows, columns)
    size = host.cute_scale_cosize(block_k, rows, columns)
    packed = moe.pack_scale(scale, "atom")
    assert packed.numel() == size == -(-rows // 128) * 128 * -(-columns // 4) * 4  # S2-7: cosize, not size
    assert torch.equal(packed.flatten(), atoms_by_offsets(scale, where, size))


@pytest.mark.parametrize("block_k", [16, 32])
def test_s2_5_the_probes_land_where_cute_reads(block_k: int) -> None:
    where = offsets(host.cute_scale_offsets(block_k, 256, 112), 256, 112)
    for m, k in [(1, 0), (32, 0), (128, 0), (0, 1), (0, 4), (0, 100)]:
        scale = torch.zeros(256, 112, dtype=torch.uint8)
        scale[m, k] = 0x40  # 2.0
        assert moe.pack_scale(scale, "atom").flatten().nonzero().flatten().tolist() == [where[m, k]]


def test_deepseek_v4_pro_sizes() -> None:
    """S2-8: w13's scales of the 48 local experts take 6144 x 448 bytes each, 126 MiB a layer, not 16 times that."""
    size = host.cute_scale_cosize(16, 6144, 448)
    assert size == 6144 * 448 and 48 * size == 126 * 2**20
    shape = moe.pack_scale(torch.empty(48, 6144, 448, dtype=torch.uint8, device="meta"), "atom").shape
    assert shape.numel() == 48 * size


# ---- the CUDA code of pack_scale and unpack_scale, thread by thread --------------------------------------------------


def storage_of(packed: Tensor) -> Tensor:
    """The words of a packed matrix as they lie in memory."""
    words = packed.view(torch.int32)
    size = 1 + sum((n - 1) * stride for n, stride in zip(words.shape, words.stride(), strict=True))
    return words.as_strided((size,), (1,))


def check_kernels(layout: str, scale: Tensor, expert_offsets: Tensor | None = None) -> None:
    """Both directions against the reference; what the kernel leaves unwritten is full of ones."""
    number, (rows, columns) = SCALE_LAYOUTS.index(layout), scale.shape
    data = b"" if expert_offsets is None else expert_offsets.numpy().tobytes()
    packed = host.pack_scale(number, scale.numpy().tobytes(), rows, columns, data)
    expected = moe.pack_scale(scale, layout, expert_offsets=expert_offsets)
    got = torch.frombuffer(bytearray(packed), dtype=torch.int32)
    if layout in ("words_mn", "utccp"):  # between the columns lies what belongs to no row
        got = got.as_strided(expected.shape, expected.stride())
    else:
        expected = storage_of(expected)
        assert (got[len(expected) :] == -1).all()  # nothing is written past the end
        got = got[: len(expected)]
    assert torch.equal(got, expected)
    back = torch.frombuffer(bytearray(host.unpack_scale(number, packed, rows, columns, data)), dtype=torch.uint8)
    used = rows if expert_offsets is None else int(expert_offsets[-1])
    assert torch.equal(back.view(rows, columns)[:used], scale[:used])
    assert (back.view(rows, columns)[used:] == 0xFF).all()  # rows of no expert are not touched


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_the_kernels_pack_as_the_reference(layout: str, rows: int, columns: int) -> None:
    if layout == "utccp":
        rows = -(-rows // 128) * 128
    check_kernels(layout, torch.randint(0, 255, (rows, columns)).to(torch.uint8))


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 5, 127, 128, 129, 300]), min_size=1, max_size=9),
    columns=st.integers(1, 9),
)
def test_the_kernels_give_experts_atoms_of_their_own(counts: list[int], columns: int) -> None:
    expert_offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rows = int(expert_offsets[-1]) + 2  # the last two are no expert's
    check_kernels("atom", torch.randint(0, 255, (rows, columns)).to(torch.uint8), expert_offsets)


# ---- quantisers ------------------------------------------------------------------------------------------------------

ROUNDED = {act_format for acts in ROUNDED_ACTS.values() for act_format in acts}
QUANTISED = [name for name, format in FORMATS.items() if format.has_scale]
# Blocks that break quantisers: nothing, one number, NaN, infinity, denormals, ties, the ends of every type.
AWKWARD = [
    [0.0, -0.0],
    [math.nan, math.nan],
    [math.inf, 1.0, -math.inf],
    [math.nan, -3.0, math.inf, 0.1],
    [1e-45, -1e-40, 1e-38],
    [3.4028234663852886e38, -1e38],
    [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -2.5, -5.0],
    [448.0, 464.0, 2.0**-10, 2.0**-9 * 1.5, 17.0, 19.0, -21.0],
    [127.0, 0.5, 1.5, 2.5, -0.5, -1.5],
    [1e30, 1e-30, -1.0],
]
floats = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


def check_block(name: str, xs: list[float], global_scale: float) -> None:
    """One block: codes (any NaN equals any NaN) and stored scale, bit for bit, and the numbers that they stand for."""
    format = FORMATS[name]
    x = torch.tensor([xs + [0.0] * (-len(xs) % 8)], dtype=torch.float32)
    given = torch.tensor([global_scale]) if format.has_global_scale else None
    values, scale = format.quantize(x, (1, x.shape[1]), given)
    data, stored = host.quantize_block(name, x.numpy().tobytes(), global_scale)
    expected = values.contiguous().view(torch.uint8).flatten()
    got = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    is_nan = values.float().isnan().flatten() & (got & 0x7F == 0x7F) if values.dtype.is_floating_point else False
    assert ((got == expected) | is_nan).all(), (xs, got.tolist(), expected.tolist())
    integer = torch.int32 if scale.dtype == torch.float32 else torch.uint8
    assert stored == scale.view(integer).item() & 0xFFFFFFFF
    if name in ROUNDED:
        if name == "fp8_block":  # what float32 scales could make larger than bfloat16 can be
            largest = torch.finfo(torch.bfloat16).max
            values, scale = format.quantize(x.clamp(-largest, largest), (1, x.shape[1]), given)
        numbers = format.dequantize(values, scale, (1, x.shape[1])).flatten()
        rounded = torch.frombuffer(
            bytearray(host.round_block(name, x.numpy().tobytes(), global_scale)), dtype=torch.float32
        )
        assert torch.equal(rounded.isnan(), numbers.isnan()) and torch.equal(
            rounded.nan_to_num(), numbers.nan_to_num()
        ), xs


@pytest.mark.parametrize("name", QUANTISED)
def test_device_code_of_the_quantisers(name: str) -> None:
    for xs in AWKWARD:
        for global_scale in (1.0, 0.37, 1e-30, 1e30) if FORMATS[name].has_global_scale else (1.0,):
            check_block(name, xs, torch.tensor(global_scale).item())
    generator = torch.Generator().manual_seed(0)
    for seed in range(200):
        x = torch.randn(32, generator=generator) * 2.0 ** (seed % 60 - 30)
        check_block(name, x.bfloat16().tolist(), 1.0)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(QUANTISED),
    xs=st.lists(floats, min_size=1, max_size=24),
    global_scale=st.floats(2.0**-100, 2.0**100, width=32),
)
def test_device_code_of_the_quantisers_with_anything(name: str, xs: list[float], global_scale: float) -> None:
    check_block(name, xs, global_scale if FORMATS[name].has_global_scale else 1.0)


def test_device_code_rounds_every_bf16_as_the_reference() -> None:
    """All 65536 bf16 numbers, in blocks of every magnitude; the small ones also where the scale is fixed."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    for name in QUANTISED:
        for block in every.view(-1, 4096):
            check_block(name, block.tolist(), 1.0)
        small = every[(every.abs() <= 6.0)]
        check_block(name, [6.0, *small.tolist()], 1.0)
        check_block(name, [448.0, *small.tolist()], 1.0)


def test_fp8_block_scale_is_the_quotient() -> None:
    """Every mantissa, between the ends of the range, and amax that are clamped: the bits of a division."""
    ends = [0.0, 1e-30, 1e-10, 3.4028234663852886e38, math.inf]
    for first in (2.0**-33, 1.0, 2.0**126):
        amax = torch.arange(1 << 23, dtype=torch.int32).add_(torch.tensor(first).view(torch.int32)).view(torch.float32)
        amax = torch.cat([amax, torch.tensor(ends)])
        got = torch.frombuffer(bytearray(host.fp8_block_scales(amax.numpy().tobytes())), dtype=torch.float32)
        assert torch.equal(got, amax.clamp(1e-10, torch.finfo(torch.float32).max) / 448)


def test_device_code_unpacks_words_of_four_bit_codes() -> None:
    """Each bit of a code alone, and random codes: where packed_weights.py puts them, and nothing else."""
    g = torch.Generator().manual_seed(0)
    codes = torch.cat([torch.eye(8, dtype=torch.int64) << bit for bit in range(4)])
    codes = torch.cat([codes, torch.randint(0, 16, (10_000, 8), generator=g)])
    words, expected = torch.zeros(len(codes), dtype=torch.int64), torch.zeros(len(codes), 4, dtype=torch.int64)
    for i, positions in enumerate(BITS):  # of code i, the lower or the upper half of register i // 2
        for bit, (place, target) in enumerate(zip(positions, REGISTER_BITS, strict=True)):
            value = codes[:, i] >> bit & 1
            words |= value << place
            expected[:, i // 2] |= value << (target + 16 * (i % 2))
    got = host.unpack_words(words.to(torch.int32).numpy().tobytes())
    got = torch.frombuffer(bytearray(got), dtype=torch.int32).view(-1, 4).long() & 0xFFFFFFFF
    assert torch.equal(got, expected)


@given(rows=st.integers(0, 3000), extra=st.sampled_from([0, 16]))
@settings(deadline=None)
def test_token_tiles_cover_the_rows_once(rows: int, extra: int) -> None:
    """128 rows a tile but the last, or one or two tall tiles as high as each other; never more tiles than without."""
    begins = host.token_tiles(rows, 128, extra)
    heights = [end - begin for begin, end in zip(begins, begins[1:], strict=False)]
    assert begins[0] == 0 and begins[-1] == rows and all(height > 0 for height in heights)
    assert len(heights) <= -(-rows // 128)
    if max(heights, default=0) > 128:
        assert len(heights) in (1, 2) and max(heights) - min(heights) <= 1
        assert 128 <= min(heights) and max(heights) <= 128 + extra
    else:
        assert all(height == 128 for height in heights[:-1])


def test_token_tiles_of_a_few_rows_more() -> None:
    """144 and 288 rows are as many as one or two tall tiles hold; three or more are never tall."""
    tiles = {rows: len(host.token_tiles(rows, 128, 16)) - 1 for rows in (128, 129, 144, 145, 256, 257, 288, 289, 385)}
    assert tiles == {128: 1, 129: 1, 144: 1, 145: 2, 256: 2, 257: 2, 288: 2, 289: 3, 385: 4}
    assert host.token_tiles(265, 128, 16) == [0, 132, 265]
