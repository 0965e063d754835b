"""pack_scale: every layout against its definition, written once more as plain index arithmetic; what is padded is 0."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.scale_layouts import SCALE_LAYOUTS


def distinct_scales(*shape: int) -> Tensor:
    """No two neighbours in any direction are equal, none is 0."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.int64) * 37 % 251 + 1).to(torch.uint8).view(shape)


def places(layout: str, rows: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """(m, k, byte offset in the storage of packed), from the text of docs/ops.md."""
    words, rows_4 = -(-columns // 4), -(-rows // 4) * 4
    for m in range(rows):
        for k in range(columns):
            if layout == "words":
                yield m, k, m * words * 4 + k
            elif layout == "words_mn":
                yield m, k, (k // 4 * rows_4 + m) * 4 + k % 4
            elif layout == "utccp":
                yield m, k, (k // 4 * rows_4 + m // 128 * 128 + m % 32 * 4 + m // 32 % 4) * 4 + k % 4
            else:
                yield m, k, (m // 128 * words + k // 4) * 512 + m % 32 * 16 + m // 32 % 4 * 4 + k % 4


def storage_of(packed: Tensor) -> Tensor:
    """The bytes of a packed matrix, up to the last one that belongs to it."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(packed.shape, packed.stride(), strict=True))
    return packed.as_strided((size,), (1,)).view(torch.uint8)


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 9), (128, 4), (128, 13), (130, 5), (256, 24), (384, 3)])
def test_s2_6_against_the_definition(layout: str, rows: int, columns: int) -> None:
    if layout == "utccp" and rows % 128:
        pytest.skip("utccp takes whole 128 rows")
    scale = distinct_scales(rows, columns)
    packed = moe.pack_scale(scale.view(torch.float8_e4m3fn), layout)
    assert packed.dtype == (torch.float8_e4m3fn if layout == "atom" else torch.int32)
    storage = storage_of(packed)
    expected = torch.zeros(len(storage), dtype=torch.uint8)
    for m, k, offset in places(layout, rows, columns):
        expected[offset] = scale[m, k]
    written = torch.ones(len(storage), dtype=torch.bool)
    if layout == "words_mn" and rows % 4:  # rows between the columns: allocated for the alignment, part of no scale
        written = (torch.arange(len(storage)) // 4 % (-(-rows // 4) * 4)) < rows
    assert torch.equal(storage[written], expected[written])


def test_s2_7_s2_8_shapes_and_strides() -> None:
    """S2-7/8: round_up(rows, 128) x round_up(columns, 4) bytes, and no more. S4-1: MN-major on 16 bytes."""
    scale = torch.zeros(3, 130, 449).to(torch.float8_e4m3fn)
    shapes = {layout: moe.pack_scale(scale, layout) for layout in ("words", "words_mn", "atom")}
    assert shapes["words"].shape == (3, 130, 113) and shapes["words"].stride() == (130 * 113, 113, 1)
    assert shapes["words_mn"].shape == (3, 130, 113) and shapes["words_mn"].stride() == (132 * 113, 1, 132)
    assert shapes["atom"].shape == (3, 2, 113, 32, 4, 4) and shapes["atom"].is_contiguous()
    assert shapes["atom"].untyped_storage().nbytes() == 3 * 256 * 452
    utccp = moe.pack_scale(scale[:, :128], "utccp")
    assert utccp.shape == (3, 128, 113) and utccp.stride() == (128 * 113, 1, 128)


def test_s2_4_the_view_of_masked_gemms() -> None:
    """S0-6/7: kernels that name the atom's view (32, 4, rm, 4, rk, l) get it by permuting, without a copy."""
    atoms = moe.pack_scale(distinct_scales(5, 256, 8), "atom")  # [l, rm, rk, 32, 4, 4]
    view = atoms.permute(3, 4, 1, 5, 2, 0)
    assert view.shape == (32, 4, 2, 4, 2, 5)
    assert view[7, 3, 1, 2, 1, 4] == distinct_scales(5, 256, 8)[4, 128 + 3 * 32 + 7, 4 + 2]


# S2-5: the probes of the source document: one scale is changed and exactly its own row of the output may change.
PROBES = {
    (1, 0): "f0",
    (32, 0): "f1 * 32",
    (128, 0): "f2 * 128",
    (0, 1): "f4",
    (0, 4): "f5 * 4",
    (0, 100): "tiles of k",
}


@pytest.mark.parametrize("m, k", PROBES, ids=PROBES.values())
def test_s2_5_single_scale_probes(m: int, k: int) -> None:
    rows, columns = 256, 112  # K = 1792 with a scale for each 16
    x = torch.ones(rows, columns * 16)
    values, scale = moe.quantize(x, "nvfp4")
    scale = torch.ones(rows, columns).to(scale.dtype)
    scale[m, k] = 2.0
    # As a kernel would: it reads the scale of (row, column) at the atom's byte.
    storage = storage_of(moe.pack_scale(scale, "atom"))
    read = torch.empty(rows, columns, dtype=torch.uint8)
    for row, column, offset in places("atom", rows, columns):
        read[row, column] = storage[offset]
    fmt = moe.FORMATS["nvfp4"]
    sums = fmt.dequantize(values, read.view(scale.dtype), (1, 16)).sum(1)
    base = fmt.dequantize(values, torch.ones_like(scale), (1, 16)).sum(1)
    assert (sums != base).nonzero().flatten().tolist() == [m]


def test_s2_5_the_table_of_the_source_document() -> None:
    """Byte index -> (m, k), for 8192 rows and 448 columns: m = f0 + 32 f1 + 128 f2, k = f4 + 4 f5."""
    flat = {0: (0, 0), 1: (0, 1), 4: (32, 0), 16: (1, 0), 511: (127, 3), 512: (0, 4), 1024: (0, 8), 8192: (0, 64)}
    flat |= {65536: (128, 64), 131072: (256, 128)}
    scale = torch.zeros(8192, 448, dtype=torch.uint8)
    for i, (m, k) in enumerate(flat.values()):
        scale[m, k] = i + 1
    storage = storage_of(moe.pack_scale(scale, "atom"))
    assert storage[list(flat)].tolist() == list(range(1, len(flat) + 1))
    assert storage.count_nonzero() == len(flat)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 5, 127, 128, 129, 300]), min_size=1, max_size=6), columns=st.integers(1, 9)
)
def test_experts_start_at_atoms_of_their_own(counts: list[int], columns: int) -> None:
    """What each expert finds at its atoms is what its rows give alone, whatever lies past the last row."""
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rows = int(offsets[-1])
    scale = distinct_scales(rows + 3, columns)
    packed = moe.pack_scale(scale, "atom", expert_offsets=offsets)
    assert packed.shape[0] == (rows + 3 + 127 * len(counts)) // 128
    seen = torch.zeros(len(packed), dtype=torch.bool)
    for expert in range(len(counts)):
        alone = moe.pack_scale(scale[offsets[expert] : offsets[expert + 1]], "atom")
        first = (int(offsets[expert]) + 127 * expert) // 128
        assert torch.equal(packed[first : first + len(alone)], alone)
        assert not seen[first : first + len(alone)].any()
        seen[first : first + len(alone)] = True
    assert not packed[~seen].any()


def test_s2_3_words_reinterpret_bits() -> None:
    """S2-3: byte 0x3F is the e4m3 0.9375, not the number 63."""
    words = torch.tensor([[0x3F403F38]], dtype=torch.int32)
    scale = moe.unpack_scale(words, "words", 1, 4, torch.float8_e4m3fn)
    assert scale.float().tolist() == [[1.0, 1.875, 2.0, 1.875]]
    packed = moe.pack_scale(scale, "words")
    assert torch.equal(packed, words)
    uint32 = packed.view(torch.uint32)  # the form [T, K/64] of other systems
    assert torch.equal(moe.unpack_scale(uint32, "words", 1, 4, scale.dtype).float(), scale.float())


def test_s4_1_utccp_is_the_transpose_of_the_source_document() -> None:
    """S4-1: four bytes to an int32, then (G, -1, 4, 32, words).transpose(2, 3), MN-major."""
    scale = distinct_scales(2, 384, 12)
    words = scale.view(torch.int32)  # [2, 384, 3]
    expected = words.view(2, -1, 4, 32, 3).transpose(2, 3).reshape(2, 384, 3)
    packed = moe.pack_scale(scale, "utccp")
    assert torch.equal(packed, expected) and packed.stride(-2) == 1


def test_in_one_graph_for_any_number_of_rows() -> None:
    """Packed and unpacked in the middle of a compiled graph: strides arrive as they are, no size is specialised."""
    torch._dynamo.reset()
    compilations = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]):  # noqa: ANN202
        compilations.append(graph)
        return torch._inductor.compile(graph, example_inputs)

    def layer(x: Tensor, expert_offsets: Tensor) -> tuple[Tensor, ...]:
        scale = moe.quantize(x * 2, "nvfp4")[1].view(torch.uint8)
        size = scale.shape
        words = moe.pack_scale(scale, "words_mn")
        atoms = moe.pack_scale(scale, "atom", expert_offsets=expert_offsets)
        back = moe.unpack_scale(words, "words_mn", *size, scale.dtype)
        rows = moe.unpack_scale(atoms, "atom", *size, scale.dtype, expert_offsets=expert_offsets)
        return words + 1, atoms, back, rows

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        for rows in (7, 64, 300, 1, 130):
            x, offsets = torch.randn(rows, 208), torch.tensor([0, rows // 3, rows // 3, rows]).int()
            for got, expected in zip(compiled(x, offsets), layer(x, offsets), strict=True):
                assert torch.equal(got.int(), expected.int()) and got.shape == expected.shape, rows
    assert len(compilations) <= 2


def test_rows_before_the_first_expert_have_no_place() -> None:
    offsets = torch.tensor([200, 300, 310], dtype=torch.int32)
    scale = torch.randint(1, 255, (310, 4), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    packed = moe.pack_scale(scale, "atom", expert_offsets=offsets)
    unpacked = moe.unpack_scale(packed, "atom", 310, 4, scale.dtype, expert_offsets=offsets)
    assert torch.equal(unpacked.view(torch.uint8)[200:], scale.view(torch.uint8)[200:])
    used = packed.view(torch.uint8).flatten(1).any(1)
    assert used.tolist() == [False, True, False, True]  # atoms begin anew with each expert


def test_atoms_that_start_between_words() -> None:
    scale = torch.randint(0, 255, (130, 6), dtype=torch.uint8)
    packed = moe.pack_scale(scale, "atom")
    moved = torch.zeros(packed.numel() + 1, dtype=torch.uint8)[1:].view(packed.shape).copy_(packed)
    assert torch.equal(moe.unpack_scale(moved, "atom", 130, 6, torch.uint8), scale)
