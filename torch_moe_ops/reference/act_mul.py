"""act, act_scale = quantize(activation(gate) * up): gate_up [P, 2I] -> [P, I/pack]."""

from __future__ import annotations

from torch import Tensor

from ..activations import get_activation, split_gate_up
from ..formats import get_format
from ._values import expect_offset_values
from .quantize import global_scale_of_rows, lay_out_scale, quantize_rows


def act_mul(
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
) -> tuple[Tensor, Tensor]:
    expect_offset_values("act_mul", expert_offsets, len(gate_up))
    record, fmt = get_activation("act_mul", activation), get_format("act_mul", format)
    x = gate_up.float()
    y = record.apply(*split_gate_up(x, layout), alpha, beta, limit) if record.gated else record.apply(x)
    values, scale = quantize_rows(fmt, y, global_scale_of_rows(global_scale, expert_offsets, len(y)))
    return values, lay_out_scale(fmt, scale)
