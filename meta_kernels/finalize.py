"""expert_out [P, H] -> output [T, H], bfloat16 or float16."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import FLOAT32, FLOATS, INT32, expect_sizes, expect_tensor


def check(
    expert_out: Tensor,
    slot_to_row: Tensor,
    *,
    topk_weights: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> None:
    expect_sizes("finalize", "expert_out", expert_out, FLOATS, ("P", "H"))
    shape = expect_sizes("finalize", "slot_to_row", slot_to_row, INT32, ("T", "K"), expert_out.device)
    if topk_weights is not None:
        expect_tensor("finalize", "topk_weights", topk_weights, FLOAT32, shape, expert_out.device)


def fake(expert_out: Tensor, slot_to_row: Tensor, **options: object) -> Tensor:
    check(expert_out, slot_to_row, **options)
    shape = (slot_to_row.shape[0], expert_out.shape[1])
    return torch.empty(shape, dtype=output_dtype(expert_out.dtype), device=expert_out.device)


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of finalize for expert_out of `dtype`: float32 is an intermediate, never an output."""
    return torch.bfloat16 if dtype == torch.float32 else dtype
