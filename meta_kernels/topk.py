"""router_logits [T, Eg] -> topk_weights float32 [T, K], topk_ids int32 [T, K]."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import FLOAT32, FLOATS, expect_choice, expect_range, expect_sizes, expect_tensor, refuse

SCORINGS = ("softmax", "sigmoid")


def check(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
) -> None:
    _, num_experts = expect_sizes("topk", "router_logits", router_logits, FLOATS, ("T", "Eg"))
    expect_choice("topk", "scoring", scoring, SCORINGS)
    if correction_bias is not None:
        expect_tensor("topk", "correction_bias", correction_bias, FLOAT32, (num_experts,), router_logits.device)
    if num_groups < 1 or num_experts % num_groups:
        refuse("topk", "num_groups", f"a divisor of {num_experts}", num_groups)
    expect_range("topk", "topk_groups", topk_groups, 1, num_groups)
    expect_range("topk", "top_k", top_k, 1, num_experts // num_groups * topk_groups)


def fake(router_logits: Tensor, top_k: int, **options: object) -> tuple[Tensor, Tensor]:
    check(router_logits, top_k, **options)
    shape = (router_logits.shape[0], top_k)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)
