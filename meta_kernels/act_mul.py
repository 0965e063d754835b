"""gate_up [P, 2I] (or [P, I]) -> act [P, I/pack], act_scale [P, scale columns] (fp8_block: MN-major)."""

from __future__ import annotations

from torch import Tensor

from ..activations import LAYOUTS, get_activation
from ..formats import get_format
from ._check import FLOATS, expect_choice, expect_offsets, expect_sizes, refuse
from ._sizes import empty_act_scale, empty_values
from .quantize import check_global_scale, check_pack, check_unquantised


def check(
    gate_up: Tensor,
    expert_offsets: Tensor,
    *,
    activation: str = "silu",
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float | None = None,
    layout: str = "gate_up",
    format: str = "bf16",
    global_scale: Tensor | None = None,
) -> None:
    op = "act_mul"
    columns = expect_sizes(op, "gate_up", gate_up, FLOATS, ("P", "columns"))[1]
    num_experts = expect_offsets(op, expert_offsets, gate_up.device)
    check_activation(op, activation, alpha, beta, limit)
    check_layout(op, "layout", layout, activation)
    fmt = get_format(op, format)
    check_unquantised(op, "format", fmt, gate_up.dtype)
    if get_activation(op, activation).gated:
        if columns % 2:
            refuse(op, "gate_up", f"an even number of columns for {activation}", list(gate_up.shape))
        columns = columns // 2
    check_pack(op, "gate_up", fmt, gate_up, columns)
    check_global_scale(op, "global_scale", fmt, global_scale, num_experts, gate_up.device)


def fake(
    gate_up: Tensor, expert_offsets: Tensor, *, activation: str = "silu", format: str = "bf16", **options: object
) -> tuple[Tensor, Tensor]:
    check(gate_up, expert_offsets, activation=activation, format=format, **options)
    fmt = get_format("act_mul", format)
    rows, columns = gate_up.shape
    if get_activation("act_mul", activation).gated:
        columns = columns // 2
    return empty_values(fmt, rows, columns, gate_up.device), empty_act_scale(fmt, rows, columns, gate_up.device)


def check_layout(op: str, name: str, layout: str, activation: str) -> None:
    """Of gate and up, where there are both."""
    expect_choice(op, name, layout, LAYOUTS)
    if layout != "gate_up" and not get_activation(op, activation).gated:
        refuse(op, name, f"gate_up for {activation}, which is not gated", layout)


def check_activation(op: str, activation: str, alpha: float, beta: float, limit: float | None) -> None:
    """An option that an activation does not use is refused, never dropped."""
    record = get_activation(op, activation)
    if not record.takes_alpha_beta and alpha != 1.0:
        refuse(op, "alpha", f"1.0 for {activation}", alpha)
    if not record.takes_alpha_beta and beta != 0.0:
        refuse(op, "beta", f"0.0 for {activation}", beta)
    if limit is not None and not record.takes_limit:
        refuse(op, "limit", f"none for {activation}", limit)
    if limit is None and record.needs_limit:
        refuse(op, "limit", f"a number for {activation}", None)
    if limit is not None and not limit >= 0:
        refuse(op, "limit", "a number >= 0", limit)
