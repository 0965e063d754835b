"""output[t] = factor * sum over k of topk_weights[t, k] * expert_out[slot_to_row[t, k]]: [P, H] -> [T, H]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..meta_kernels.finalize import output_dtype


def finalize(
    expert_out: Tensor,
    slot_to_row: Tensor,
    *,
    topk_weights: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> Tensor:
    num_tokens, top_k = slot_to_row.shape
    padded = torch.nn.functional.pad(expert_out, (0, 0, 0, 1))  # one more row stands in for absent slots
    total = torch.zeros((num_tokens, expert_out.shape[1]), dtype=torch.float32, device=expert_out.device)
    for k in range(top_k):
        row = slot_to_row[:, k].long()
        inside = (row >= 0) & (row < len(expert_out))
        term = padded[torch.where(inside, row, len(expert_out))].float()  # [T, H]
        if topk_weights is not None:
            term = topk_weights[:, k, None] * term
        # Selected, not multiplied by zero: the weight of an absent slot may be anything, NaN too.
        total = torch.where(inside[:, None], total + term, total)
    no_row = (slot_to_row < -1) | (slot_to_row >= len(expert_out))  # -2, say, of an id that is out of range
    total = total.masked_fill(no_row.any(dim=1, keepdim=True), float("nan"))
    return (total * routed_scaling_factor).to(output_dtype(expert_out.dtype), memory_format=torch.contiguous_format)
