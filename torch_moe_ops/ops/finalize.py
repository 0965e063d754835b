"""output[t] = factor * sum over k of topk_weights[t, k] * expert_out[slot_to_row[t, k]]: [P, H] -> [T, H]."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = """(Tensor expert_out, Tensor slot_to_row, *, Tensor? topk_weights=None, float routed_scaling_factor=1.0)
-> Tensor"""


def facts(expert_out: Tensor, slot_to_row: Tensor, **_: object) -> dict[str, object]:
    return {"top_k": slot_to_row.shape[1]}


def finalize(
    expert_out: Tensor,
    slot_to_row: Tensor,
    *,
    topk_weights: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    """Brings the experts' rows back to their tokens and adds them up, in float32 and in the order of k.

        output[t] = routed_scaling_factor * sum over k of topk_weights[t, k] * expert_out[slot_to_row[t, k]]

    Args:
        expert_out: bfloat16, float16 or float32 [P, H], contiguous.
        slot_to_row: int32 [T, K]; a slot with -1 is skipped, -2 (an id out of range) makes the token's output NaN.
        topk_weights: float32 [T, K]; 1 if absent (they were applied on the input).
        routed_scaling_factor: multiplies the sum, once.

    Returns:
        [T, H] in expert_out's dtype (bfloat16 for float32). A token without slots here is 0.

    Raises:
        RuntimeError: ``finalize: argument: expected ..., got ...``

    Source: Shazeer et al., arXiv:1701.06538, for the sum.
    """
    return torch.ops.moe.finalize.default(
        expert_out, slot_to_row, topk_weights=topk_weights, routed_scaling_factor=routed_scaling_factor
    )
