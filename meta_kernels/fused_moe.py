"""hidden_states [T, H], w13 [E, 2I, H/pack] (or [E, I, H/pack]), w2 [E, H, I/pack] -> output [T, H]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import get_activation
from ..formats import Format
from ..packed_weights import is_packed
from ._check import BF16_FP16, FLOAT32, INT32, expect_sizes, expect_tensor, refuse
from .act_mul import check_activation, check_layout
from .grouped_gemm import check_formats, check_weight, expect_weight
from .quantize import check_global_scale, check_pack, check_unquantised


def check(
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
) -> None:
    op, device = "fused_moe", hidden_states.device
    weights, acts = check_formats(op, format, act_format)
    num_tokens, hidden_size = expect_sizes(op, "hidden_states", hidden_states, BF16_FP16, ("T", "H"))
    check_unquantised(op, "act_format" if act_format else "format", acts, hidden_states.dtype)
    check_activation(op, activation, alpha, beta, limit)
    parts = 2 if get_activation(op, activation).gated else 1
    num_experts, intermediate_size = _check_sizes(op, weights, acts, hidden_states, w2)
    if is_packed(w13) != is_packed(w2):
        refuse(op, "w13", "packed or not as w2 is", list(w13.shape))
    sizes = (num_experts, parts * intermediate_size, hidden_size)
    check_weight(op, "w13", weights, acts, w13, w13_scale, w13_global_scale, w13_bias, sizes, parts, device)
    sizes = (num_experts, hidden_size, intermediate_size)
    check_weight(op, "w2", weights, acts, w2, w2_scale, w2_global_scale, w2_bias, sizes, 1, device)
    check_global_scale(op, "a13_global_scale", acts, a13_global_scale, num_experts, device)
    check_global_scale(op, "a2_global_scale", acts, a2_global_scale, num_experts, device)
    top_k = expect_sizes(op, "topk_ids", topk_ids, INT32, ("T", "K"), device)[1]
    expect_tensor(op, "topk_ids", topk_ids, INT32, (num_tokens, top_k), device)
    expect_tensor(op, "topk_weights", topk_weights, FLOAT32, (num_tokens, top_k), device)
    if expert_map is not None:
        expect_sizes(op, "expert_map", expert_map, INT32, ("Eg",), device)
    if apply_router_weight_on_input and top_k != 1:
        refuse(op, "apply_router_weight_on_input", "top_k 1", f"top_k {top_k}")
    check_layout(op, "w13_layout", w13_layout, activation)


def fake(
    hidden_states: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, **options: object
) -> Tensor:
    check(hidden_states, w13, w2, topk_weights, topk_ids, **options)
    return torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)


def _check_sizes(op: str, weights: Format, acts: Format, hidden_states: Tensor, w2: Tensor) -> tuple[int, int]:
    """(E, I), which w2 [E, H, I/pack] states; both GEMMs' K must fill whole stored elements."""
    dims, device = ("E", "H", "I"), hidden_states.device
    num_experts, _, intermediate_size = expect_weight(op, "w2", weights, acts, w2, dims, device)
    if num_experts == 0:
        refuse(op, "w2", "at least one expert", list(w2.shape))
    for fmt in (weights, acts):
        check_pack(op, "hidden_states", fmt, hidden_states, hidden_states.shape[1])
        check_pack(op, "w2", fmt, w2, intermediate_size)
    return num_experts, intermediate_size
