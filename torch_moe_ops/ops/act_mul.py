"""act, act_scale = quantize(activation(gate) * up): gate_up [P, 2I] -> [P, I/pack]."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = """(Tensor gate_up, Tensor expert_offsets, *, str activation="silu", float alpha=1.0, float beta=0.0,
float? limit=None, str layout="gate_up", str format="bf16", Tensor? global_scale=None)
-> (Tensor act, Tensor act_scale)"""


def facts(
    gate_up: Tensor, expert_offsets: Tensor, *, activation: str = "silu", format: str = "bf16", **_: object
) -> dict[str, object]:
    return {"format": format, "activation": activation}


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
    """The activation between the two GEMMs, in float32, then quantised.

        silu         y = (up + beta) * gate * sigmoid(alpha * gate);  with limit: gate = min(gate, limit),
                     up = clamp(up, -limit, limit) first. gpt-oss: alpha 1.702, beta 1, limit 7
        gelu         y = gelu(gate) * up, with erf;  gelu_tanh: the tanh approximation
        relu         y = max(gate, 0) * up
        swiglustep   y = min(silu(gate), limit) * clamp(up, -limit, limit)
        relu2_no_mul, gelu_no_mul, silu_no_mul: y = f(x), not gated

    Args:
        gate_up: bfloat16, float16 or float32 [P, 2I] ([P, I] if not gated), contiguous.
        expert_offsets: int32 [E + 1]; rows at or past its last element are not computed.
        activation: one of the names above.
        alpha, beta: of silu; other activations refuse them.
        limit: of silu and, required, of swiglustep; at least 0.
        layout: where gate and up are: ``"gate_up"``, ``"up_gate"``, or ``"interleaved"`` (gate, up, gate, up, ...).
        format: bf16 or fp16 (the dtype of gate_up, unless that is float32) or a quantised format.
        global_scale: float32, one element or [E]; nvfp4 only.

    Returns:
        act [P, I/pack] and act_scale [P, scale columns], the latter MN-major for fp8_block as in `permute`.

    Raises:
        RuntimeError: ``act_mul: argument: expected ..., got ...``; on a CPU for values of expert_offsets, too.

    Sources: Shazeer, arXiv:2002.05202, for gates; Hendrycks and Gimpel, arXiv:1606.08415, for gelu; So et al.,
    arXiv:2109.08668, for relu2; gpt-oss's model code for alpha, beta and limit; `quantize`'s.
    """
    return torch.ops.moe.act_mul.default(
        gate_up,
        expert_offsets,
        activation=activation,
        alpha=alpha,
        beta=beta,
        limit=limit,
        layout=layout,
        format=format,
        global_scale=global_scale,
    )
