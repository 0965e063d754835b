"""topk_weights, topk_ids = the top_k best of softmax(router_logits) or sigmoid(router_logits): [T, Eg] -> [T, K]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import in_float64

INFINITY = float("inf")


def topk(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    logits = router_logits.float()
    # -inf scores 0 under both functions, so a NaN logit neither weighs anything nor spoils its neighbours.
    logits = logits.masked_fill(logits.isnan(), -INFINITY)
    scores = in_float64(torch.sigmoid, logits) if scoring == "sigmoid" else torch.softmax(logits, dim=-1)
    scores = scores.nan_to_num(nan=0.0)  # the softmax of a row of -inf  [T, Eg]
    choice = scores if correction_bias is None else scores + correction_bias
    choice = choice.masked_fill(router_logits.isnan() | choice.isnan(), -INFINITY)
    ranked = choice.argsort(dim=-1, descending=True, stable=True)  # stable: ties go to the lower id  [T, Eg]
    if num_groups > 1:
        outside = ~_eligible(choice, num_groups, topk_groups)
        ranked = ranked.gather(-1, outside.gather(-1, ranked).int().argsort(dim=-1, stable=True))
    ids = ranked[:, :top_k]
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    weights = weights * routed_scaling_factor
    # With the strides that the fake states, also where they do not matter: no rows, or one.
    contiguous = {"memory_format": torch.contiguous_format}
    return weights.clone(**contiguous), ids.to(torch.int32, **contiguous)


def _eligible(choice: Tensor, num_groups: int, topk_groups: int) -> Tensor:
    """Which experts lie in one of the best groups, bool [T, Eg]; a group scores the sum of its two largest choices."""
    grouped = choice.unflatten(-1, (num_groups, choice.shape[-1] // num_groups))  # [T, groups, Eg / groups]
    group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)  # [T, groups]
    best = group_scores.argsort(dim=-1, descending=True, stable=True)[:, :topk_groups]
    eligible = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, best, True)
    return eligible.unsqueeze(-1).expand_as(grouped).flatten(1)
