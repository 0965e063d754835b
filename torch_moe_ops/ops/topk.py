"""topk_weights, topk_ids = the top_k best of softmax(router_logits) or sigmoid(router_logits): [T, Eg] -> [T, K]."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = """(Tensor router_logits, int top_k, *, str scoring="softmax", Tensor? correction_bias=None,
int num_groups=1, int topk_groups=1, bool renormalize=True, float routed_scaling_factor=1.0)
-> (Tensor topk_weights, Tensor topk_ids)"""


def facts(router_logits: Tensor, top_k: int, *, num_groups: int = 1, **_: object) -> dict[str, object]:
    return {"num_experts": router_logits.shape[1], "top_k": top_k, "num_groups": num_groups}


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
    """The top_k experts of each token and their weights.

        s = softmax(router_logits) or sigmoid(router_logits), in float32
        choice = s + correction_bias                       (selection only)
        topk_ids = the top_k largest choices, descending   (ties: the lower id; NaN logits last)
        topk_weights = s[topk_ids] [/ (their sum + 1e-20)] * routed_scaling_factor

    Args:
        router_logits: bfloat16, float16 or float32 [T, Eg], contiguous.
        top_k: experts per token, 1 to topk_groups * Eg / num_groups.
        scoring: ``"softmax"`` or ``"sigmoid"``.
        correction_bias: float32 [Eg], added for the selection, not to the weights (DeepSeek-V3).
        num_groups: groups of Eg / num_groups experts; a group scores the sum of its two largest choices.
        topk_groups: only experts of this many best groups are eligible (ties: the lower group).
        renormalize: divide the weights by their sum.
        routed_scaling_factor: multiplies the weights, once. Give it here or to `finalize` / `fused_moe`, not to both.

    Returns:
        topk_weights float32 [T, K] and topk_ids int32 [T, K]. An expert with a NaN logit weighs 0.

    Raises:
        RuntimeError: ``topk: argument: expected ..., got ...``

    Sources: Shazeer et al., arXiv:1701.06538, for softmax; DeepSeek-V3, arXiv:2412.19437, section 2.1.2, and its model
    code for sigmoid, groups and a bias that only selects.
    """
    return torch.ops.moe.topk.default(
        router_logits,
        top_k,
        scoring=scoring,
        correction_bias=correction_bias,
        num_groups=num_groups,
        topk_groups=topk_groups,
        renormalize=renormalize,
        routed_scaling_factor=routed_scaling_factor,
    )
