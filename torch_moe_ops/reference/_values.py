"""Checks of values, for CPU tensors alone: on a GPU to look at them would need a synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..meta_kernels._check import refuse


def expect_offset_values(op: str, expert_offsets: Tensor, rows: int) -> None:
    """0 <= expert_offsets[0] <= .. <= expert_offsets[E] <= rows."""
    if expert_offsets.device.type != "cpu":
        return
    least = torch.cat([expert_offsets.new_zeros(1), expert_offsets[:-1]])
    bad = ((expert_offsets < least) | (expert_offsets > rows)).nonzero()
    if len(bad):
        index = int(bad[0])
        got = f"{int(expert_offsets[index])} {f'after {int(least[index])}' if index else 'first'}"
        refuse(op, "expert_offsets", f"values in [0, {rows}] that do not decrease", got)


def expect_ids(op: str, name: str, ids: Tensor, end: int) -> None:
    """Values in [-1, end)."""
    if ids.device.type == "cpu":
        bad = ids[(ids < -1) | (ids >= end)]
        if len(bad):
            refuse(op, name, f"values in [-1, {end})", int(bad[0]))
