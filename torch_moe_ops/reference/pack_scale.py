"""scale [..., rows, columns] -> packed, in one of the layouts of scale_layouts.py."""

from __future__ import annotations

from torch import Tensor

from ..scale_layouts import pack
from ._values import expect_offset_values


def pack_scale(scale: Tensor, layout: str, *, expert_offsets: Tensor | None = None) -> Tensor:
    if expert_offsets is not None:
        expect_offset_values("pack_scale", expert_offsets, scale.shape[-2])
    return pack(scale, layout, expert_offsets)
