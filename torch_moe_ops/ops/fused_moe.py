"""output[t] = sum over k of topk_weights[t, k] * w2[e] @ act(w13[e] @ hidden_states[t]), e = topk_ids[t, k]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import Gemm
from ..packed_weights import is_packed, weight_sizes

SCHEMA = """(Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, *,
Tensor? w13_scale=None, Tensor? w2_scale=None, Tensor? w13_global_scale=None, Tensor? w2_global_scale=None,
Tensor? a13_global_scale=None, Tensor? a2_global_scale=None, Tensor? w13_bias=None, Tensor? w2_bias=None,
Tensor? expert_map=None, str format="bf16", str act_format="", str activation="silu", float alpha=1.0,
float beta=0.0, float? limit=None, float routed_scaling_factor=1.0, bool apply_router_weight_on_input=False,
str w13_layout="gate_up") -> Tensor"""


def facts(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    format: str = "bf16",
    act_format: str = "",
    activation: str = "silu",
    **_: object,
) -> dict[str, object]:
    num_experts, hidden_size, intermediate_size = weight_sizes(w2, format)
    n = weight_sizes(w13, format)[1]
    dtypes = [bias.dtype for bias in (w13_bias, w2_bias) if bias is not None]
    return {
        "format": format,
        "act_format": act_format,
        "activation": activation,
        "gemms": (Gemm(n, hidden_size, n // max(intermediate_size, 1)), Gemm(hidden_size, intermediate_size)),
        "num_experts": num_experts,
        "top_k": topk_ids.shape[1],
        "out_dtype": hidden_states.dtype,
        "bias_dtype": next((dtype for dtype in dtypes if dtype != torch.bfloat16), dtypes[0] if dtypes else None),
        "packed": is_packed(w2),
    }


def fused_moe(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    w13_global_scale: Tensor | None = None,
    w2_global_scale: Tensor | None = None,
    a13_global_scale: Tensor | None = None,
    a2_global_scale: Tensor | None = None,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    format: str = "bf16",
    act_format: str = "",
    activation: str = "silu",
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float | None = None,
    routed_scaling_factor: float = 1.0,
    apply_router_weight_on_input: bool = False,
    w13_layout: str = "gate_up",
) -> Tensor:
    """The experts of a Mixture-of-Experts layer, from routed tokens to their weighted sum.

        output[t] = routed_scaling_factor * sum over k of topk_weights[t, k] * (w2[e] @ y + w2_bias[e])
        y = activation(w13[e] @ hidden_states[t] + w13_bias[e]),   e = topk_ids[t, k]

    It computes sort_slots -> permute -> grouped_gemm(w13) -> act_mul -> grouped_gemm(w2) -> finalize; a backend fuses
    as much of that as pays. The result of a token does not depend on the other tokens of the batch.

    Args:
        hidden_states: bfloat16 or float16 [T, H], contiguous.
        w13: [E, 2I, H/pack], gate over up (see `w13_layout`); [E, I, H/pack] for activations that are not gated.
        w2: [E, H, I/pack]. Both may be results of `pack_weight` for these activations, which hold their scales.
        topk_weights: float32 [T, K].
        topk_ids: int32 [T, K]; -1 for an absent slot.
        w13_scale, w2_scale: the weights' scales, any strides; blocks of rows are counted within each half of w13's rows
            as they are stored, so if those are interleaved, a block has rows of gate and of up.
        w13_global_scale: float32 [E, 2], of the first and the second half of w13's rows as they are stored, or [E];
            nvfp4 weights only. w2_global_scale: float32 [E] or [E, 1].
        a13_global_scale, a2_global_scale: float32, one element or [E], of the two GEMMs' activations; nvfp4 only.
        w13_bias, w2_bias: [E, 2I] and [E, H], bfloat16, float16 or float32.
        expert_map: int32 [Eg], from topk_ids to local experts or -1.
        format: of the weights.
        act_format: of the activations; "" = `format`. "bf16" or "fp16" with quantised weights is weight-only
            quantisation; nvfp4 and mxfp4 weights also take "fp8_block" and "fp8_block_e8m0", mxfp4 "mxfp8".
        activation, alpha, beta, limit: see `act_mul`.
        routed_scaling_factor: multiplies the output, once. Leave it at 1 if `topk` has applied it.
        apply_router_weight_on_input: multiply hidden_states, not the experts' outputs, by topk_weights; K = 1 only.
        w13_layout: ``"gate_up"``, ``"up_gate"`` or ``"interleaved"`` rows of w13.

    Returns:
        [T, H] in the dtype of hidden_states.

    Raises:
        RuntimeError: ``fused_moe: argument: expected ..., got ...``; on a CPU ``sort_slots: ...`` for values of
            topk_ids and expert_map.

    Source: Shazeer et al., arXiv:1701.06538; those of the stages.
    """
    return torch.ops.moe.fused_moe.default(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        w13_scale=w13_scale,
        w2_scale=w2_scale,
        w13_global_scale=w13_global_scale,
        w2_global_scale=w2_global_scale,
        a13_global_scale=a13_global_scale,
        a2_global_scale=a2_global_scale,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        expert_map=expert_map,
        format=format,
        act_format=act_format,
        activation=activation,
        alpha=alpha,
        beta=beta,
        limit=limit,
        routed_scaling_factor=routed_scaling_factor,
        apply_router_weight_on_input=apply_router_weight_on_input,
        w13_layout=w13_layout,
    )
