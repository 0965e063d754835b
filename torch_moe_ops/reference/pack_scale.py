"""scale [..., rows, columns] -> packed, in one of the layouts of scale_layouts.py."""

from __future__ import annotations

from torch import Tensor

from ..scale_layouts import pack


def pack_scale(scale: Tensor, layout: str, *, expert_offsets: Tensor | None = None) -> Tensor:
    return pack(scale, layout, expert_offsets)
