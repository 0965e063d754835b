"""scale = unpack_scale(packed): the one-byte scales [rows, columns] or [E, rows, columns] that pack_scale laid out."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = """(Tensor packed, str layout, SymInt rows, SymInt columns, ScalarType dtype, *, Tensor? expert_offsets=None)
    -> Tensor"""


def facts(packed: Tensor, layout: str, rows: int, columns: int, dtype: torch.dtype, **_: object) -> dict[str, object]:
    return {}


def unpack_scale(
    packed: Tensor,
    layout: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    expert_offsets: Tensor | None = None,
) -> Tensor:
    """The inverse of `pack_scale`: the bytes go back to their places, their bits are reinterpreted, never converted.

    Args:
        packed: a matrix or a batch of matrices as `pack_scale` lays them out: int32 (or uint32) [.., rows, W] for
            words, words_mn and utccp, bytes [.., atom rows, W, 32, 4, 4] for atom.
        layout: words, words_mn, utccp or atom.
        rows, columns: the sizes of the scale matrix; W = ceil(columns / 4).
        dtype: of the scales: float8_e4m3fn, float8_e8m0fnu or uint8.
        expert_offsets: what `pack_scale` was given. Rows outside of the experts' ranges are unspecified then.

    Returns:
        scale [rows, columns] or [E, rows, columns], contiguous.

    Raises:
        RuntimeError: ``unpack_scale: argument: expected ..., got ...``

    Sources: those of `pack_scale`.
    """
    return torch.ops.moe.unpack_scale.default(packed, layout, rows, columns, dtype, expert_offsets=expert_offsets)
