"""Schemas are frozen: new arguments go last, with defaults. Every function of an op agrees with its schema."""

from __future__ import annotations

import importlib
import inspect
import textwrap

import pytest
import torch
from expecttest import assert_expected_inline

from torch_moe_ops._library import READS_STRIDED_SCALES
from torch_moe_ops.backends import CANDIDATES, OPS

LAYERS = {"ops": "{op}", "reference": "{op}", "triton": "{op}", "meta_kernels": "check"}


def overload(op: str, name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops.moe, op), name)


def test_schemas_are_frozen() -> None:
    schemas = [textwrap.fill(str(overload(op, "default")._schema), 110, subsequent_indent="    ") for op in OPS]
    assert_expected_inline(
        "\n".join(schemas),
        """\
moe::topk(Tensor router_logits, int top_k, *, str scoring="softmax", Tensor? correction_bias=None, int
    num_groups=1, int topk_groups=1, bool renormalize=True, float routed_scaling_factor=1.) -> (Tensor
    topk_weights, Tensor topk_ids)
moe::sort_slots(Tensor topk_ids, int num_experts, *, Tensor? expert_map=None, int alignment=1) -> (Tensor
    expert_offsets, Tensor slot_to_row, Tensor row_to_slot)
moe::quantize(Tensor input, str format, *, Tensor? global_scale=None) -> (Tensor values, Tensor scale)
moe::permute(Tensor hidden_states, Tensor slot_to_row, SymInt num_rows, *, str format="bf16", Tensor?
    global_scale=None, Tensor? expert_offsets=None, Tensor? topk_weights=None) -> (Tensor permuted, Tensor
    permuted_scale)
moe::grouped_gemm(Tensor a, Tensor b, Tensor expert_offsets, *, Tensor? a_scale=None, Tensor? b_scale=None,
    Tensor? a_global_scale=None, Tensor? b_global_scale=None, Tensor? bias=None, Tensor? expert_rows=None, str
    format="bf16", str act_format="", int b_parts=1, ScalarType? out_dtype=None) -> Tensor
moe::act_mul(Tensor gate_up, Tensor expert_offsets, *, str activation="silu", float alpha=1., float beta=0.,
    float? limit=None, str layout="gate_up", str format="bf16", Tensor? global_scale=None) -> (Tensor act,
    Tensor act_scale)
moe::finalize(Tensor expert_out, Tensor slot_to_row, *, Tensor? topk_weights=None, float
    routed_scaling_factor=1.) -> Tensor
moe::fused_moe(Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, *, Tensor?
    w13_scale=None, Tensor? w2_scale=None, Tensor? w13_global_scale=None, Tensor? w2_global_scale=None,
    Tensor? a13_global_scale=None, Tensor? a2_global_scale=None, Tensor? w13_bias=None, Tensor? w2_bias=None,
    Tensor? expert_map=None, str format="bf16", str act_format="", str activation="silu", float alpha=1.,
    float beta=0., float? limit=None, float routed_scaling_factor=1., bool apply_router_weight_on_input=False,
    str w13_layout="gate_up") -> Tensor
moe::pack_scale(Tensor scale, str layout, *, Tensor? expert_offsets=None) -> Tensor
moe::unpack_scale(Tensor packed, str layout, SymInt rows, SymInt columns, ScalarType dtype, *, Tensor?
    expert_offsets=None) -> Tensor""",
    )


@pytest.mark.parametrize("op", OPS)
def test_backends_have_the_same_schema(op: str) -> None:
    assert getattr(torch.ops.moe, op).overloads() == ["default", *CANDIDATES[op]]
    for backend in CANDIDATES[op]:
        assert str(overload(op, backend)._schema) == str(overload(op, "default")._schema).replace(
            op, f"{op}.{backend}", 1
        )


@pytest.mark.parametrize("op", OPS)
def test_ops_are_functional_and_tagged(op: str) -> None:
    for name in getattr(torch.ops.moe, op).overloads():
        schema, tags = overload(op, name)._schema, overload(op, name).tags
        assert not schema.is_mutable and all(value.alias_info is None for value in (*schema.arguments, *schema.returns))
        assert torch.Tag.pt2_compliant_tag in tags
        assert (torch.Tag.needs_exact_strides in tags) == (op in READS_STRIDED_SCALES)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("op", OPS)
def test_functions_agree_with_the_schema(op: str, layer: str) -> None:
    """The dispatcher leaves arguments out that equal the schema's defaults: all defaults must be the same."""
    if layer == "triton":
        pytest.importorskip("triton")
    module = importlib.import_module(f"torch_moe_ops.{layer}.{op}")
    parameters = inspect.signature(getattr(module, LAYERS[layer].format(op=op))).parameters
    arguments = overload(op, "default")._schema.arguments
    assert list(parameters) == [argument.name for argument in arguments]
    for argument in arguments:
        parameter = parameters[argument.name]
        assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) == argument.kwarg_only
        default = parameter.default if parameter.default is not inspect.Parameter.empty else None
        assert default == argument.default_value and type(default) is type(argument.default_value)
