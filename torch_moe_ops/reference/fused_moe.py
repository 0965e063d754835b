"""output [T, H] = finalize(grouped_gemm(act_mul(grouped_gemm(permute(hidden_states), w13)), w2)), the stages in turn.

gate_up, between the first GEMM and the activation, is float32; expert_out has the dtype of hidden_states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import get_activation
from .act_mul import act_mul
from .finalize import finalize
from .grouped_gemm import grouped_gemm
from .permute import permute
from .sort_slots import sort_slots


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
    act_format = act_format or format
    formats = {"format": format, "act_format": act_format}
    input_weights, output_weights = (topk_weights, None) if apply_router_weight_on_input else (None, topk_weights)

    expert_offsets, slot_to_row, row_to_slot = sort_slots(topk_ids, w13.shape[0], expert_map=expert_map)
    permuted, permuted_scale = permute(
        hidden_states,
        slot_to_row,
        len(row_to_slot),
        format=act_format,
        global_scale=a13_global_scale,
        expert_offsets=expert_offsets,
        topk_weights=input_weights,
    )
    gate_up = grouped_gemm(
        permuted,
        w13,
        expert_offsets,
        a_scale=permuted_scale,
        b_scale=w13_scale,
        a_global_scale=a13_global_scale,
        b_global_scale=w13_global_scale,
        bias=w13_bias,
        b_parts=2 if get_activation("fused_moe", activation).gated else 1,
        out_dtype=torch.float32,
        **formats,
    )
    act, act_scale = act_mul(
        gate_up,
        expert_offsets,
        activation=activation,
        alpha=alpha,
        beta=beta,
        limit=limit,
        layout=w13_layout,
        format=act_format,
        global_scale=a2_global_scale,
    )
    expert_out = grouped_gemm(
        act,
        w2,
        expert_offsets,
        a_scale=act_scale,
        b_scale=w2_scale,
        a_global_scale=a2_global_scale,
        b_global_scale=w2_global_scale,
        bias=w2_bias,
        out_dtype=hidden_states.dtype,
        **formats,
    )
    return finalize(expert_out, slot_to_row, topk_weights=output_weights, routed_scaling_factor=routed_scaling_factor)
