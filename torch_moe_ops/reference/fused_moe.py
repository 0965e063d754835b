"""output [T, H] = finalize(grouped_gemm(act_mul(grouped_gemm(permute(hidden_states), w13)), w2)), stages in turn."""

from __future__ import annotations

from functools import partial

from .. import stages
from .act_mul import act_mul
from .finalize import finalize
from .grouped_gemm import grouped_gemm
from .permute import permute
from .sort_slots import sort_slots

fused_moe = partial(stages.fused_moe, stages.Stages(sort_slots, permute, grouped_gemm, act_mul, finalize))
