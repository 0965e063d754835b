"""unpack_scale undoes pack_scale for every layout, size, stride and byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.scale_layouts import SCALE_LAYOUTS

DTYPES = [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8]


@settings(max_examples=200, deadline=None)
@given(
    layout=st.sampled_from(SCALE_LAYOUTS),
    lead=st.sampled_from([(), (1,), (3,), (0,)]),
    rows=st.one_of(st.integers(0, 9), st.integers(120, 300)),
    columns=st.integers(0, 13),
    dtype=st.sampled_from(DTYPES),
    is_transposed=st.booleans(),
)
def test_round_trip(
    layout: str, lead: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype, is_transposed: bool
) -> None:
    if layout == "utccp":
        rows = rows // 128 * 128
    generator = torch.Generator().manual_seed(rows * 16 + columns)
    scale = torch.randint(0, 256, (*lead, rows, columns), generator=generator).to(torch.uint8)
    source = scale.mT.contiguous().mT if is_transposed else scale
    packed = moe.pack_scale(source.view(dtype), layout)
    back = moe.unpack_scale(packed, layout, rows, columns, dtype)
    assert back.dtype == dtype and back.is_contiguous()
    assert torch.equal(back.view(torch.uint8), scale)


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_packing_what_was_unpacked_gives_the_same_words(layout: str) -> None:
    """The other way round, for sizes without padding."""
    packed = moe.pack_scale(torch.randint(0, 256, (2, 256, 8)).to(torch.uint8), layout)
    again = moe.pack_scale(moe.unpack_scale(packed, layout, 256, 8, torch.uint8), layout)
    assert torch.equal(again, packed) and again.stride() == packed.stride()


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=5), columns=st.integers(1, 9))
def test_round_trip_by_experts(counts: list[int], columns: int) -> None:
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rows = int(offsets[-1])
    scale = torch.randint(0, 256, (rows + 2, columns)).to(torch.uint8)
    packed = moe.pack_scale(scale, "atom", expert_offsets=offsets)
    back = moe.unpack_scale(packed, "atom", rows + 2, columns, torch.uint8, expert_offsets=offsets)
    assert torch.equal(back[:rows], scale[:rows])  # the rows of no expert are unspecified


def test_atoms_may_be_bytes() -> None:
    scale = torch.randint(0, 256, (130, 5)).to(torch.uint8)
    atoms = moe.pack_scale(scale, "atom")
    assert torch.equal(moe.unpack_scale(atoms, "atom", 130, 5, torch.float8_e4m3fn).view(torch.uint8), scale)


@pytest.mark.parametrize("layout", ["words_mn", "words", "utccp"])
def test_export_with_any_number_of_rows(layout: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, scale: Tensor) -> Tensor:
            packed = moe.pack_scale(scale, layout)
            return moe.unpack_scale(packed, layout, scale.shape[0], scale.shape[1], torch.uint8)

    step = 128 if layout == "utccp" else 1
    rows = step * torch.export.Dim("tiles", min=1, max=64) if step > 1 else torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(
        Module(), (torch.zeros(2 * 128, 5, dtype=torch.uint8),), dynamic_shapes={"scale": {0: rows}}
    )
    scale = torch.randint(0, 256, (3 * 128, 5), dtype=torch.uint8)
    assert torch.equal(exported.module()(scale), scale)
