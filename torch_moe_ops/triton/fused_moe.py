"""output [T, H] = finalize(grouped_gemm(act_mul(grouped_gemm(permute(hidden_states), w13)), w2)), stages in turn."""

from __future__ import annotations

from functools import partial

from torch_moe_ops import stages
from torch_moe_ops.triton.act_mul import act_mul
from torch_moe_ops.triton.finalize import finalize
from torch_moe_ops.triton.grouped_gemm import grouped_gemm
from torch_moe_ops.triton.permute import permute
from torch_moe_ops.triton.sort_slots import sort_slots

fused_moe = partial(stages.fused_moe, stages.Stages(sort_slots, permute, grouped_gemm, act_mul, finalize, "triton"))
