"""fused_moe as its stages in turn, as SM100 and SM120 run it, with other implementations of the stages."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from moe_cases import make_moe

import torch_moe_ops as moe
from torch_moe_ops._library import STAGED
from torch_moe_ops.backends import CANDIDATES, built_backends
from torch_moe_ops.stages import Stages, fused_moe

STAGE_OPS = [op for op in Stages._fields if op != "backend"]


@pytest.mark.parametrize("backend", STAGED)
@pytest.mark.parametrize("format, act_format", [("fp8_block", ""), ("mxfp4", "mxfp8"), ("nvfp4", "")])
def test_the_stages_in_turn_are_the_layer(backend: str, format: str, act_format: str) -> None:
    overloads = {op: getattr(torch.ops.moe, op).reference for op in STAGE_OPS}
    called = []

    def recorded(op: str) -> object:
        return lambda *args, **options: (called.append(op), overloads[op](*args, **options))[1]

    stages = Stages(**{op: recorded(op) for op in STAGE_OPS}, backend=backend)
    call = make_moe(format, act_format=act_format, routed_scaling_factor=2.5)
    assert torch.equal(fused_moe(stages, *call.args, **call.options), call(moe.fused_moe))
    assert called == ["sort_slots", "permute", "grouped_gemm", "act_mul", "grouped_gemm", "finalize"]


def test_formats_are_refused_before_the_first_stage() -> None:
    stages = Stages(*(pytest.fail for _ in STAGE_OPS), backend="cutlass_sm120")
    call = make_moe("int8")
    with pytest.raises(RuntimeError) as caught:
        fused_moe(stages, *call.args, **call.options)
    assert_expected_inline(
        str(caught.value),
        """fused_moe: backend: expected one that can run this problem, got cutlass_sm120 (multiplies fp8_block, mxfp8, mxfp4, nvfp4, got int8)""",  # noqa: E501
    )


@pytest.mark.parametrize("backend", STAGED)
def test_where_the_gemm_is_built_the_layer_is(backend: str) -> None:
    assert backend in CANDIDATES["fused_moe"]
    assert (backend in built_backends("fused_moe", "cuda")) == (backend in built_backends("grouped_gemm", "cuda"))
