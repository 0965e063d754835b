"""packed = pack_scale(scale): one-byte scales [rows, columns] or [E, rows, columns] in a kernel's layout."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = """(Tensor scale, str layout, *, Tensor? expert_offsets=None) -> Tensor"""


def facts(scale: Tensor, layout: str, **_: object) -> dict[str, object]:
    return {}


def pack_scale(scale: Tensor, layout: str, *, expert_offsets: Tensor | None = None) -> Tensor:
    """Lays out the scales of nvfp4, mxfp4 or mxfp8 for a kernel; `unpack_scale` is the inverse. No bit changes.

    =========  ====================================================  ==========================================
    layout     packed, W = ceil(columns / 4)                         read by
    =========  ====================================================  ==========================================
    words      int32 [.., rows, W], first column in the lowest byte  anything: four scales in one load
    words_mn   the same, strides (1, round_up(rows, 4))              TMA
    utccp      words_mn, each 128 rows as 32x4; rows % 128 == 0      tcgen05.cp
    atom       bytes [.., ceil(rows / 128), W, 32, 4, 4], zero-      CUTLASS and cuBLAS block-scaled GEMMs
               padded: scale (m, k) at [m/128, k/4, m%32, m/32%4, k%4]
    =========  ====================================================  ==========================================

    At weight load, pack once and put the result in the scale's place; scales of activations are packed in each call.

    Args:
        scale: float8_e4m3fn, float8_e8m0fnu or uint8 [rows, columns] or [E, rows, columns], any strides.
        layout: a name from the table.
        expert_offsets: int32 [E + 1], for atom and [rows, columns] only: the rows of each expert start at an atom of
            their own, expert e at atom row (expert_offsets[e] + 127 e) / 128 of (rows + 127 E) / 128.

    Returns:
        The table's tensor: words are int32; atoms have scale's dtype.

    Raises:
        RuntimeError: ``pack_scale: argument: expected ..., got ...``

    Sources: CUTLASS, Sm1xxBlockScaledConfig; PTX ISA, tcgen05.cp .32x128b.warpx4 and the scale matrix layouts.
    """
    return torch.ops.moe.pack_scale.default(scale, layout, expert_offsets=expert_offsets)
