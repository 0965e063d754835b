"""packed -> scale [..., rows, columns]: the inverse of pack_scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scale_layouts import unpack
from ._values import expect_offset_values


def unpack_scale(
    packed: Tensor,
    layout: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    expert_offsets: Tensor | None = None,
) -> Tensor:
    if expert_offsets is not None:
        expect_offset_values("unpack_scale", expert_offsets, rows)
    return unpack(packed, layout, rows, columns, dtype, expert_offsets)
