"""fused_moe as its stages in turn, whoever computes them:

    output [T, H] = finalize(grouped_gemm(act_mul(grouped_gemm(permute(hidden_states), w13)), w2))

gate_up, between the first GEMM and the activation, is float32; expert_out has the dtype of hidden_states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import get_activation
from .backends import expect_formats
from .packed_weights import is_packed


class Stages(NamedTuple):
    """One implementation of each op that fused_moe is made of; the `backend` of the GEMM decides about formats."""

    sort_slots: Callable
    permute: Callable
    grouped_gemm: Callable
    act_mul: Callable
    finalize: Callable
    backend: str = "reference"


def fused_moe(
    stages: Stages,
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
    if stages.backend != "reference":
        expect_formats("fused_moe", stages.backend, format, act_format, is_packed(w2))
    formats = {"format": format, "act_format": act_format}
    input_weights, output_weights = (topk_weights, None) if apply_router_weight_on_input else (None, topk_weights)

    expert_offsets, slot_to_row, row_to_slot = stages.sort_slots(topk_ids, w13.shape[0], expert_map=expert_map)
    permuted, permuted_scale = stages.permute(
        hidden_states,
        slot_to_row,
        row_to_slot.shape[0],
        format=act_format,
        global_scale=a13_global_scale,
        expert_offsets=expert_offsets,
        topk_weights=input_weights,
    )
    gate_up = stages.grouped_gemm(
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
    act, act_scale = stages.act_mul(
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
    expert_out = stages.grouped_gemm(
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
    return stages.finalize(
        expert_out, slot_to_row, topk_weights=output_weights, routed_scaling_factor=routed_scaling_factor
    )
