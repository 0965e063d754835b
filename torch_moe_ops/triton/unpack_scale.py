"""packed -> scale [..., rows, columns]: pack_scale's kernel in the other direction."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_moe_ops.scale_layouts import packed_shape
from torch_moe_ops.triton.pack_scale import launch


def unpack_scale(
    packed: Tensor,
    layout: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    expert_offsets: Tensor | None = None,
) -> Tensor:
    lead = packed.shape[: packed.dim() - len(packed_shape(layout, rows, columns))]
    scale = torch.empty((*lead, rows, columns), dtype=dtype, device=packed.device)
    launch(scale, packed, layout, expert_offsets, is_packing=False)
    return scale
