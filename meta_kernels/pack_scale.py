"""scale [rows, columns] or [E, rows, columns] -> packed, in one of the layouts of scale_layouts.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scale_layouts import ATOM_ROWS, MN_MAJOR_WORDS, SCALE_LAYOUTS, empty_packed, packed_shape
from ._check import describe, expect_choice, expect_offsets, expect_tensor, refuse
from ._sizes import round_up

ONE_BYTE = (torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8)
# pack_scale gives int32, which more of torch's operators know; other systems hand over uint32.
WORDS = (torch.int32, torch.uint32)


def check(scale: Tensor, layout: str, *, expert_offsets: Tensor | None = None) -> None:
    op = "pack_scale"
    if scale.dtype not in ONE_BYTE or scale.dim() not in (2, 3):
        expected = "one byte a scale, [rows, columns] or [E, rows, columns]"
        refuse(op, "scale", expected, describe(scale.dtype, scale.shape, scale.device))
    check_layout(op, layout, scale.shape[-2], scale.dim() == 3, expert_offsets, scale.device)


def fake(scale: Tensor, layout: str, *, expert_offsets: Tensor | None = None) -> Tensor:
    check(scale, layout, expert_offsets=expert_offsets)
    *lead, rows, columns = scale.shape
    num_experts = 0 if expert_offsets is None else expert_offsets.shape[0] - 1
    return empty_packed(layout, lead, rows, columns, num_experts, scale.dtype, scale.device)


def check_layout(
    op: str, layout: str, rows: int, is_batch: bool, expert_offsets: Tensor | None, device: torch.device
) -> None:
    """What both directions demand of the layout and the rows."""
    expect_choice(op, "layout", layout, SCALE_LAYOUTS)
    if layout == "utccp" and rows % ATOM_ROWS:
        refuse(op, "rows", f"a multiple of {ATOM_ROWS} for utccp", rows)
    if expert_offsets is None:
        return
    if layout != "atom" or is_batch:
        refuse(op, "expert_offsets", "none but for one matrix in the layout atom", list(expert_offsets.shape))
    expect_offsets(op, expert_offsets, device)


def check_packed(
    op: str,
    name: str,
    packed: Tensor,
    layout: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    num_experts: int = 0,
    lead: tuple[int, ...] | None = None,
) -> None:
    """A packed scale [rows, columns] of `dtype`, or a batch of them (of `lead`, if it is given): dtype, size, order and
    alignment.

    For every op that reads packed scales: each mistake is named here instead of shifting the scales in silence.
    """
    dtypes = tuple(dict.fromkeys((dtype, torch.uint8))) if layout == "atom" else WORDS
    shape = packed_shape(layout, rows, columns, num_experts)
    lead = packed.shape[: packed.dim() - len(shape)][-1:] if lead is None else lead
    contiguous = layout in ("words", "atom")
    expect_tensor(op, name, packed, dtypes, (*lead, *shape), device, contiguous=contiguous)
    if contiguous or 0 in packed.shape:
        return
    strides = (shape[1], 1) if packed.is_contiguous() else packed.stride()[-2:]
    if rows > 1 and strides[0] != 1:
        refuse(op, name, f"MN-major words, strides [1, ..] for {layout}", list(strides))
    aligned = strides[1] == round_up(rows, MN_MAJOR_WORDS)  # first: with symbolic sizes it is known, the others are not
    if shape[1] > 1 and not aligned and (strides[1] % MN_MAJOR_WORDS or strides[1] < rows):
        expected = f"strides [1, a multiple of {MN_MAJOR_WORDS} from {rows} on] (16 bytes, for TMA)"
        refuse(op, name, expected, list(strides))
