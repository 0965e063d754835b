"""scale [..., rows, columns] -> packed: words of four bytes move, in one of the layouts of scale_layouts.py.

A program moves ROWS packed rows x WORDS words of one matrix; ROWS divides 128, so they lie in one atom. `move_words`
serves unpack_scale too: the same places, the other direction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_moe_ops.scale_layouts import ATOM_ROWS, WORD, as_words, empty_packed
from torch_moe_ops.triton._common import on_device

TILE = {"ROWS": 32, "WORDS": 32}


@triton.jit
def _source_rows(place, rows, expert_offsets_ptr, num_experts, LAYOUT: tl.constexpr, EXPERTS: tl.constexpr):
    """The matrix row that stands at each packed place [ROWS], `rows` where there is none."""
    row = place
    if LAYOUT == "utccp" or LAYOUT == "atom":  # place 4l + j of a 128 holds row 32j + l
        row = place // 128 * 128 + place % 4 * 32 + place % 128 // 4
    if EXPERTS > 0:
        e = tl.arange(0, EXPERTS)
        offsets = tl.load(expert_offsets_ptr + e, mask=e < num_experts, other=2147483647).to(tl.int64)
        first = (offsets + 127 * e) // 128 * 128
        expert = tl.maximum(tl.sum((first <= tl.min(row)).to(tl.int32), axis=0) - 1, 0)
        begin = tl.load(expert_offsets_ptr + expert).to(tl.int64)
        end = tl.load(expert_offsets_ptr + expert + 1)
        row = begin + row - (begin + 127 * expert) // 128 * 128
        row = tl.where((row >= begin) & (row < end), row, rows)
    return row


@triton.jit(do_not_specialize=["rows", "stride_word"])
def move_words(
    scale_ptr, packed_ptr, expert_offsets_ptr, rows, columns, words, num_experts,
    stride_matrix, stride_row, stride_column, packed_matrix, stride_word,
    LAYOUT: tl.constexpr, EXPERTS: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Bytes of scale, as strided, to or from the int32 words of packed."""
    matrix = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    row = _source_rows(place, rows, expert_offsets_ptr, num_experts, LAYOUT, EXPERTS)
    if LAYOUT == "words":
        index = place[:, None] * words + word[None, :]
    elif LAYOUT == "atom":
        index = (place[:, None] // 128 * words + word[None, :]) * 128 + place[:, None] % 128
    else:
        index = word[None, :].to(tl.int64) * stride_word + place[:, None]
    packed_ptrs = packed_ptr + matrix * packed_matrix + index
    # Outside of the atom layout there is no place for a padding row.
    has_place = (word < words)[None, :] & ((row < rows) | (LAYOUT == "atom"))[:, None]
    scale_ptrs = scale_ptr + matrix * stride_matrix + row[:, None] * stride_row
    value = tl.zeros([ROWS, WORDS], tl.int32) if PACK else tl.load(packed_ptrs, mask=has_place, other=0)
    for i in tl.static_range(4):
        column = word * 4 + i
        is_inside = (column < columns)[None, :] & (row < rows)[:, None]
        byte_ptrs = scale_ptrs + column[None, :].to(tl.int64) * stride_column
        if PACK:
            value |= tl.load(byte_ptrs, mask=is_inside, other=0).to(tl.int32) << (8 * i)
        else:
            tl.store(byte_ptrs, (value >> (8 * i)).to(tl.uint8), mask=is_inside)
    if PACK:
        tl.store(packed_ptrs, value, mask=has_place)


def launch(scale: Tensor, packed: Tensor, layout: str, expert_offsets: Tensor | None, is_packing: bool) -> None:
    """Fills `packed` from `scale`, or `scale` from `packed`."""
    rows, columns = scale.shape[-2:]
    words = triton.cdiv(columns, WORD)
    if packed.numel() == 0:
        return
    is_batch = scale.dim() == 3
    packed_words = as_words(packed)
    num_experts = 0 if expert_offsets is None else len(expert_offsets) - 1
    places = packed.shape[-5] * ATOM_ROWS if layout == "atom" else rows
    grid = (triton.cdiv(places, TILE["ROWS"]), triton.cdiv(words, TILE["WORDS"]), scale.shape[0] if is_batch else 1)
    with on_device(scale):
        move_words[grid](
            scale.view(torch.uint8), packed_words, expert_offsets, rows, columns, words, num_experts,
            scale.stride(0) if is_batch else 0, *scale.stride()[-2:],
            packed_words.stride(0) if is_batch else 0, 0 if layout == "atom" else packed_words.stride(-1),
            LAYOUT=layout, EXPERTS=triton.next_power_of_2(num_experts) if num_experts else 0, PACK=is_packing, **TILE,
        )  # fmt: skip


def pack_scale(scale: Tensor, layout: str, *, expert_offsets: Tensor | None = None) -> Tensor:
    *lead, rows, columns = scale.shape
    num_experts = 0 if expert_offsets is None else len(expert_offsets) - 1
    packed = empty_packed(layout, lead, rows, columns, num_experts, scale.dtype, scale.device)
    launch(scale, packed, layout, expert_offsets, is_packing=True)
    return packed
