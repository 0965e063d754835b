"""How one-byte scales [..., rows, columns] (e4m3 or e8m0, row-major as checkpoints and quantisers have them) lie in
memory for a kernel. Bit for bit: no layout changes a value.

A word is four neighbouring columns of a row in an int32, the first in its lowest byte; missing columns are 0.

    name      packed                                              for
    words     int32 [..., rows, W], W = ceil(columns / 4)         one load for four scales
    words_mn  the same shape, strides (1, round_up(rows, 4))      TMA: MN-major, every column of words on 16 bytes
    utccp     words_mn, the rows of each 128 as a 32x4 matrix     tcgen05.cp (SM100); rows % 128 == 0
    atom      bytes [..., ceil(rows / 128), W, 32, 4, 4]          CUTLASS and cuBLAS: the 128x4 block-scale atom

"32x4": row 32j + l of a 128 stands at place 4l + j. So scale (m, k) of the atom layout is element [m / 128, k / 4, m %
32, m / 32 % 4, k % 4], at byte (m / 128 * W + k / 4) * 512 + m % 32 * 16 + m / 32 % 4 * 4 + k % 4. Its rows and columns
are padded with zeros to whole atoms.

The atoms of rows that belong to experts (`expert_offsets` int32 [E + 1]) start anew with each expert: those of expert e
at atom row (expert_offsets[e] + 127 e) / 128, which needs no sum over the experts before it. That makes
(rows + 127 E) / 128 atom rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import ceil_div

SCALE_LAYOUTS = ("words", "words_mn", "utccp", "atom")
# Of both of the atom's sides: rows, and columns to a word.
ATOM_ROWS, WORD = 128, 4
# Words between two columns of an MN-major matrix: 16 bytes, which TMA demands of strides.
MN_MAJOR_WORDS = 4


def packed_shape(layout: str, rows: int, columns: int, num_experts: int = 0) -> tuple[int, ...]:
    """Of one matrix. `num_experts` counts the experts whose rows are packed apart (atom only)."""
    words = ceil_div(columns, WORD)
    if layout != "atom":
        return rows, words
    atom_rows = (rows + (ATOM_ROWS - 1) * num_experts) // ATOM_ROWS if num_experts else ceil_div(rows, ATOM_ROWS)
    return atom_rows, words, 32, 4, WORD


def packed_strides(layout: str, rows: int, columns: int) -> tuple[int, int]:
    """Of the rows and words of one matrix of words."""
    if layout == "words":
        return torch.sym_max(ceil_div(columns, WORD), 1), 1
    return 1, ceil_div(rows, MN_MAJOR_WORDS) * MN_MAJOR_WORDS


def empty_packed(
    layout: str,
    lead: Sequence[int],
    rows: int,
    columns: int,
    num_experts: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Room for the scales [*lead, rows, columns] of `dtype`, at most one dimension in `lead`."""
    shape = packed_shape(layout, rows, columns, num_experts)
    if layout == "atom":
        return torch.empty((*lead, *shape), dtype=dtype, device=device)
    strides = packed_strides(layout, rows, columns)
    size = strides[0] * rows if layout == "words" else strides[1] * shape[1]
    return torch.empty_strided((*lead, *shape), ((size,) * len(lead)) + strides, dtype=torch.int32, device=device)


def pack(scale: Tensor, layout: str, expert_offsets: Tensor | None = None) -> Tensor:
    """scale [..., rows, columns] -> packed."""
    *lead, rows, columns = scale.shape
    data = scale.view(torch.uint8)
    num_experts = 0
    if expert_offsets is not None:
        num_experts = len(expert_offsets) - 1
        data = torch.cat([data, data.new_zeros(1, columns)])[_row_of_places(expert_offsets, rows)]
    missing_rows = -data.shape[-2] % ATOM_ROWS if layout == "atom" else 0
    data = torch.nn.functional.pad(data, (0, -columns % WORD, 0, missing_rows))
    words = _fresh(data.unflatten(-1, (ceil_div(columns, WORD), WORD))).view(torch.int32).squeeze(-1)
    packed = empty_packed(layout, lead, rows, columns, num_experts, scale.dtype, scale.device)
    if layout == "atom":
        atoms = words.unflatten(-2, (-1, 4, 32)).movedim(-1, -3).mT  # [..., rows / 128, W, 32, 4]
        packed.view(torch.int32).copy_(atoms.unsqueeze(-1))
    else:
        packed.copy_(words.unflatten(-2, (-1, 4, 32)).transpose(-3, -2).flatten(-4, -2) if layout == "utccp" else words)
    return packed


def unpack(
    packed: Tensor, layout: str, rows: int, columns: int, dtype: torch.dtype, expert_offsets: Tensor | None = None
) -> Tensor:
    """The inverse of `pack`: the scales [..., rows, columns] of `dtype`, contiguous."""
    packed = as_words(packed)
    if layout == "atom":
        words = packed.squeeze(-1).mT.movedim(-3, -1).flatten(-4, -2)  # [..., rows, W]
    elif layout == "utccp":
        words = packed.unflatten(-2, (-1, 32, 4)).transpose(-3, -2).flatten(-4, -2)
    else:
        words = packed
    data = _fresh(words.unsqueeze(-1)).view(torch.uint8).flatten(-2)
    if expert_offsets is not None:
        data = data[_place_of_rows(expert_offsets, rows)]
    return _fresh(data[..., :rows, :columns]).view(dtype)


def as_words(packed: Tensor) -> Tensor:
    """The bytes of atoms, or uint32 words, as int32; a copy if they start between words."""
    aligned = packed.storage_offset() * packed.itemsize % WORD == 0
    return (packed if aligned else packed.clone()).view(torch.int32)


def _fresh(x: Tensor) -> Tensor:
    """A contiguous copy whose strides are regular in dimensions of size 1 too, as `view(dtype)` wants them."""
    return x.new_empty(x.shape).copy_(x)


def _first_places(expert_offsets: Tensor) -> Tensor:
    """The packed row, a multiple of 128, at which the rows of each expert start, int64 [E]."""
    offsets = expert_offsets[:-1].long()
    experts = torch.arange(len(offsets), device=offsets.device)
    return (offsets + (ATOM_ROWS - 1) * experts) // ATOM_ROWS * ATOM_ROWS


def _row_of_places(expert_offsets: Tensor, rows: int) -> Tensor:
    """The row at each packed row, int64; `rows` where there is none."""
    num_experts = len(expert_offsets) - 1
    first = _first_places(expert_offsets)
    atom_rows = packed_shape("atom", rows, 0, num_experts)[0]
    places = torch.arange(atom_rows * ATOM_ROWS, device=expert_offsets.device)
    expert = (torch.searchsorted(first, places, right=True) - 1).clamp(min=0)
    row = expert_offsets[expert] + places - first[expert]
    return torch.where((row >= expert_offsets[expert]) & (row < expert_offsets[expert + 1]), row, rows)


def _place_of_rows(expert_offsets: Tensor, rows: int) -> Tensor:
    """The packed row of each row, int64 [rows]; any place for rows of no expert."""
    row = torch.arange(rows, device=expert_offsets.device)
    expert = torch.searchsorted(expert_offsets.long(), row, right=True) - 1
    expert = expert.clamp(min=0, max=len(expert_offsets) - 2)
    return (_first_places(expert_offsets)[expert] + row - expert_offsets[expert]).clamp(min=0)
