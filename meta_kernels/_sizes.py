"""Sizes: P = max_rows(S, E, A), scale matrices, and the bytes that fused_moe's intermediates take.

The only place that computes sizes. Everything is a pure function of shapes and works on symbolic sizes: none of them
is compared as a Python bool, so nothing is specialised under torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import get_activation
from ..formats import Format
from ..packed_weights import ROUNDED_ACTS
from ._check import expect_range

# Float32 scales of (1, 128) blocks lie MN-major, each column starting on 16 bytes, as TMA and 16-byte loads want it.
MN_MAJOR_ALIGNMENT = 4


def _expect_sizes(op: str, low: int, **sizes: int) -> None:
    """Each at least `low`, as far as they are numbers: a comparison of a symbolic size would be a guard."""
    for name, size in sizes.items():
        if isinstance(size, int) and not torch.compiler.is_compiling():
            expect_range(op, name, size, low)


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def max_rows(num_slots: int, num_experts: int, alignment: int = 1) -> int:
    """P: the most rows that `num_slots` slots can take when each expert's rows are padded to a multiple of `alignment`.

        P = (S + min(E, S) (A - 1)) / A * A, rounded down;   P = S for A = 1

    At most min(E, S) experts have rows, each with at most A - 1 rows of padding, and the sum is a multiple of A.

    Args:
        num_slots: S, at least 0; T * K.
        num_experts: E, at least 0; of this rank.
        alignment: A, at least 1.

    Returns:
        P. Symbolic sizes give a symbolic one.

    Raises:
        RuntimeError: ``max_rows: argument: expected ..., got ...``
    """
    _expect_sizes("max_rows", 0, num_slots=num_slots, num_experts=num_experts)
    _expect_sizes("max_rows", 1, alignment=alignment)
    if alignment == 1:
        return num_slots
    used_experts = torch.sym_min(num_experts, num_slots)
    return (num_slots + used_experts * (alignment - 1)) // alignment * alignment


def is_mn_major(format: Format) -> bool:
    """Whether permute and act_mul write the scale MN-major."""
    return format.act_block == (1, 128) and format.scale_dtype == torch.float32


def act_scale_strides(format: Format, rows: int, columns: int) -> tuple[int, int]:
    """Strides of the scale that permute and act_mul write."""
    return (1, round_up(rows, MN_MAJOR_ALIGNMENT)) if is_mn_major(format) else (torch.sym_max(columns, 1), 1)


def empty_values(format: Format, rows: int, k: int, device: torch.device) -> Tensor:
    """[rows, k/pack], contiguous."""
    return torch.empty((rows, k // format.pack), dtype=format.dtype, device=device)


def empty_act_scale(format: Format, rows: int, k: int, device: torch.device) -> Tensor:
    """The scale of activations [rows, k] as permute and act_mul write it: MN-major for fp8_block, else contiguous."""
    shape = format.act_scale_shape(rows, k)
    strides = act_scale_strides(format, *shape)
    return torch.empty_strided(shape, strides, dtype=format.scale_dtype, device=device)


def workspace_bytes(
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    format: str = "bf16",
    act_format: str = "",
    *,
    activation: str = "silu",
    alignment: int = 1,
) -> int:
    """Bytes of all intermediates of one `fused_moe` call: a pure function of shapes.

    They are the results of sort_slots, permute, grouped_gemm, act_mul and grouped_gemm, all alive at once, with gate_up
    in float32: no backend keeps more, and one that fuses stages keeps less. Where weights that can be packed (nvfp4,
    mxfp4, mxfp8) meet quantised activations, their values count as bf16, which packed weights are multiplied by. Not
    counted are the inputs, the output [T, H] and the kernels' scratch memory: a few KiB plus a few bytes a slot.

    Args:
        num_tokens, hidden_size, intermediate_size, num_experts, top_k: T, H, I, E (of this rank) and K.
        format, act_format, activation: as `fused_moe` takes them.
        alignment: of each expert's rows; the ops' own is 1.

    Returns:
        Bytes. Symbolic sizes give a symbolic number.

    Raises:
        RuntimeError: ``workspace_bytes: argument: expected ..., got ...``
    """
    from .grouped_gemm import check_formats  # imports this module

    op = "workspace_bytes"
    fmt = check_formats(op, format, act_format)[1]
    sizes = dict(num_tokens=num_tokens, hidden_size=hidden_size, intermediate_size=intermediate_size, top_k=top_k)
    _expect_sizes(op, 0, **sizes)
    _expect_sizes(op, 1, num_experts=num_experts, alignment=alignment)
    value_bits = 16 if fmt.name in ROUNDED_ACTS.get(format, ()) else 8 * fmt.dtype.itemsize // fmt.pack
    gate_up_columns = intermediate_size * (2 if get_activation(op, activation).gated else 1)
    slots = num_tokens * top_k
    rows = max_rows(slots, num_experts, alignment)
    maps = 4 * (num_experts + 1 + slots + rows)  # expert_offsets, slot_to_row, row_to_slot
    gate_up, expert_out = 4 * rows * gate_up_columns, 2 * rows * hidden_size
    acts = (_act_bytes(fmt, value_bits, rows, k) for k in (hidden_size, intermediate_size))
    return maps + gate_up + expert_out + sum(acts)


def _act_bytes(format: Format, value_bits: int, rows: int, k: int) -> int:
    """Bytes of quantised activations [rows, k] and of their scale as `empty_act_scale` lays it out."""
    scale_rows, scale_columns = format.act_scale_shape(rows, k)
    if is_mn_major(format):
        scale_rows = round_up(scale_rows, MN_MAJOR_ALIGNMENT)
    return rows * k * value_bits // 8 + scale_rows * scale_columns * format.scale_dtype.itemsize
