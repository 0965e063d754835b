"""Activations: y [P, I] = f(gate, up), in float32; gate and up [P, I] are the two halves of w13's output.

Non-gated activations take w13's output [P, I] alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

LAYOUTS = ("gate_up", "up_gate", "interleaved")


@dataclass(frozen=True)
class Activation:
    """One way of combining gate and up. Only its name crosses op schemas."""

    name: str
    gated: bool
    apply: Callable[..., Tensor]  # (gate, up, alpha, beta, limit) or, not gated, (x); float32 in and out
    takes_alpha_beta: bool = False
    takes_limit: bool = False
    needs_limit: bool = False


def in_float64(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), float32, rounded once: torch's float32 functions for CPUs give the last values of a tensor, and
    those of one that is not contiguous, other bits than the rest."""
    return function(x.double()).float()


def _silu(gate: Tensor, up: Tensor, alpha: float, beta: float, limit: float | None) -> Tensor:
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + beta) * (gate * in_float64(torch.sigmoid, alpha * gate))


def _swiglustep(gate: Tensor, up: Tensor, alpha: float, beta: float, limit: float) -> Tensor:
    return in_float64(F.silu, gate).clamp(max=limit) * up.clamp(-limit, limit)


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("silu", True, _silu, takes_alpha_beta=True, takes_limit=True),
        Activation("gelu", True, lambda gate, up, *_: in_float64(F.gelu, gate) * up),
        Activation("gelu_tanh", True, lambda gate, up, *_: in_float64(partial(F.gelu, approximate="tanh"), gate) * up),
        Activation("relu", True, lambda gate, up, *_: F.relu(gate) * up),
        Activation("swiglustep", True, _swiglustep, takes_limit=True, needs_limit=True),
        Activation("relu2_no_mul", False, lambda x: F.relu(x).square()),
        Activation("gelu_no_mul", False, partial(in_float64, F.gelu)),
        Activation("silu_no_mul", False, partial(in_float64, F.silu)),
    )
}


def get_activation(op: str, name: str) -> Activation:
    """The activation called `name`, or a one-line error that names the op."""
    if name not in ACTIVATIONS:
        raise RuntimeError(f"{op}: activation: expected one of {', '.join(ACTIVATIONS)}, got {name}")
    return ACTIVATIONS[name]


def split_gate_up(gate_up: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """[P, 2I] -> gate, up [P, I] (views)."""
    if layout == "interleaved":
        return gate_up[..., 0::2], gate_up[..., 1::2]
    first, second = gate_up.chunk(2, dim=-1)
    return (first, second) if layout == "gate_up" else (second, first)
