"""packed -> scale [rows, columns] or [E, rows, columns]: the inverse of pack_scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scale_layouts import packed_shape
from ._check import expect_choice, expect_range
from .pack_scale import ONE_BYTE, check_layout, check_packed


def check(
    packed: Tensor,
    layout: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    expert_offsets: Tensor | None = None,
) -> None:
    op = "unpack_scale"
    expect_choice(op, "dtype", dtype, ONE_BYTE)
    expect_range(op, "rows", rows, 0)
    expect_range(op, "columns", columns, 0)
    is_batch = packed.dim() > (5 if layout == "atom" else 2)
    check_layout(op, layout, rows, is_batch, expert_offsets, packed.device)
    num_experts = 0 if expert_offsets is None else expert_offsets.shape[0] - 1
    check_packed(op, "packed", packed, layout, rows, columns, dtype, packed.device, num_experts)


def fake(
    packed: Tensor,
    layout: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    expert_offsets: Tensor | None = None,
) -> Tensor:
    check(packed, layout, rows, columns, dtype, expert_offsets=expert_offsets)
    lead = packed.shape[: packed.dim() - len(packed_shape(layout, rows, columns))]
    return torch.empty((*lead, rows, columns), dtype=dtype, device=packed.device)
