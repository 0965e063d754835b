"""out[t] = sum over k of topk_weights[t, k] * w2[e] @ activation(w13[e] @ hidden_states[t]), e = topk_ids[t, k].

hidden_states and out [T, H]. The stages, one after another:
sort_slots -> permute(act_format) -> grouped_gemm(w13) -> act_mul(act_format) -> grouped_gemm(w2) -> finalize.
gate_up, between the first GEMM and the activation, is float32; expert_out has the dtype of hidden_states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_moe_ops.activations import get_activation
from torch_moe_ops.backends import expect_formats
from torch_moe_ops.packed_weights import is_packed
from torch_moe_ops.triton.act_mul import act_mul
from torch_moe_ops.triton.finalize import finalize
from torch_moe_ops.triton.grouped_gemm import grouped_gemm
from torch_moe_ops.triton.permute import permute
from torch_moe_ops.triton.sort_slots import sort_slots


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
    expect_formats("fused_moe", "triton", format, act_format, is_packed(w13))
    input_weights, output_weights = (topk_weights, None) if apply_router_weight_on_input else (None, topk_weights)
    gemm = {"format": format, "act_format": act_format}
    parts = 2 if get_activation("fused_moe", activation).gated else 1

    expert_offsets, slot_to_row, row_to_slot = sort_slots(topk_ids, w13.shape[0], expert_map=expert_map)
    a, a_scale = permute(
        hidden_states, slot_to_row, row_to_slot.shape[0],
        format=act_format, global_scale=a13_global_scale, expert_offsets=expert_offsets, topk_weights=input_weights,
    )  # fmt: skip
    gate_up = grouped_gemm(
        a, w13, expert_offsets,
        a_scale=a_scale, b_scale=w13_scale, a_global_scale=a13_global_scale, b_global_scale=w13_global_scale,
        bias=w13_bias, b_parts=parts, out_dtype=torch.float32, **gemm,
    )  # fmt: skip
    act, act_scale = act_mul(
        gate_up, expert_offsets,
        activation=activation, alpha=alpha, beta=beta, limit=limit, layout=w13_layout, format=act_format,
        global_scale=a2_global_scale,
    )  # fmt: skip
    expert_out = grouped_gemm(
        act, w2, expert_offsets,
        a_scale=act_scale, b_scale=w2_scale, a_global_scale=a2_global_scale, b_global_scale=w2_global_scale,
        bias=w2_bias, out_dtype=hidden_states.dtype, **gemm,
    )  # fmt: skip
    return finalize(expert_out, slot_to_row, topk_weights=output_weights, routed_scaling_factor=routed_scaling_factor)
