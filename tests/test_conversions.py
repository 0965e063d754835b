"""Conversions report what they cost, and the costs are those that the source documents claim or get wrong."""

from __future__ import annotations

import math

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_moe_ops as moe
import torch_moe_ops.conversions as conversions
from torch_moe_ops.conversions import convert_weight, fold_global_scale
from torch_moe_ops.experts import from_gate_up, to_gate_up
from torch_moe_ops.formats import FORMATS, encode_e8m0, quantize_weight, unpack_e2m1

NVFP4, MXFP4 = FORMATS["nvfp4"], FORMATS["mxfp4"]


def normal_weight(std: float, *shape: int) -> Tensor:
    """Trained weights are nearly normal; 0.005 to 0.05 is what checkpoints of this size have."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * std


def relative_error(approximation: Tensor, x: Tensor) -> float:
    return ((approximation.double() - x.double()).norm() / x.double().norm()).item()


# ---- convert_weight --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("format", ["fp8_block", "mxfp8", "mxfp4", "nvfp4", "int8", "bf16"])
def test_every_pair(format: str, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked equals whole, parts stay apart, and the error is that of the dequantised weights."""
    weight = normal_weight(0.02, 5, 2 * 96, 160)
    weight[:, :96] *= 7
    source, target = FORMATS[format], FORMATS[to]
    values, scale, global_scale = quantize_weight(weight.bfloat16(), format, parts=2)
    x = source.dequantize(values, scale, source.weight_block, global_scale, 2)
    monkeypatch.setattr(conversions, "CHUNK_ELEMENTS", 2 * 192 * 160)
    got = convert_weight(values, scale, format, to, weight_global_scale=global_scale, parts=2)
    want = quantize_weight(x, to, parts=2)
    for tensor, expected in zip(got[:3], want, strict=True):
        assert (tensor is None) == (expected is None)
        if tensor is not None:
            assert tensor.dtype == expected.dtype and torch.equal(as_bytes(tensor), as_bytes(expected))
    back = target.dequantize(got.weight, got.scale, target.weight_block, got.global_scale, 2)
    assert math.isclose(got.error.item(), relative_error(back, x), rel_tol=1e-9, abs_tol=1e-12)
    if format == to:
        assert got.error < 0.01  # only nvfp4's new global scale moves anything


def as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def test_s4_10_nvfp4_to_mxfp4_requantises_the_codes() -> None:
    """Requantising costs 0.115; keeping the codes and rounding pairs of scales 0.26 to 0.79, by the way they round."""
    weight = normal_weight(0.02, 2, 512, 1024)
    values, scale, global_scale = quantize_weight(weight, "nvfp4")
    x = NVFP4.dequantize(values, scale, NVFP4.weight_block, global_scale)
    converted = convert_weight(values, scale, "nvfp4", "mxfp4", weight_global_scale=global_scale)
    assert 0.11 < converted.error < 0.125
    pairs = (scale.float() * global_scale[..., None]).unflatten(-1, (-1, 2)).amax(-1)  # the document: max of a pair
    errors = {}
    for rounding in ("up", "nearest", "down"):
        merged = encode_e8m0(pairs).float() if rounding == "up" else None
        if merged is None:
            merged = torch.exp2({"nearest": torch.round, "down": torch.floor}[rounding](torch.log2(pairs)))
        errors[rounding] = relative_error(unpack_e2m1(values) * merged.repeat_interleave(32, -1), x)
    assert all(0.25 < error < 0.9 for error in errors.values()), errors
    assert min(errors.values()) > 2 * converted.error


def test_s0_11_fp8_block_to_mxfp8() -> None:
    """Exact if the float32 scales are powers of two, as in DeepSeek-V3.1; else about a rounding of e4m3."""
    weight = normal_weight(0.02, 2, 256, 512)
    values, scale, _ = quantize_weight(weight, "fp8_block")
    assert 0.02 < convert_weight(values, scale, "fp8_block", "mxfp8").error < 0.04
    powers = torch.exp2(torch.log2(scale).ceil())
    x = FORMATS["fp8_block"].dequantize(values, powers, (128, 128))
    converted = convert_weight(values, powers, "fp8_block", "mxfp8")
    assert converted.error == 0.0
    assert torch.equal(FORMATS["mxfp8"].dequantize(converted.weight, converted.scale, (1, 32)), x)


@pytest.mark.parametrize("format, to", [("mxfp4", "nvfp4"), ("mxfp8", "fp8_block"), ("nvfp4", "mxfp4")])
def test_the_same_bits_under_another_dtype(format: str, to: str) -> None:
    """Scales of e8m0 may come as uint8, 4-bit codes as float4_e2m1fn_x2, as everywhere."""
    values, scale, global_scale = quantize_weight(normal_weight(0.02, 2, 64, 128), format)
    expected = convert_weight(values, scale, format, to, weight_global_scale=global_scale)
    if format != "nvfp4":
        scale = scale.view(torch.uint8)
    if values.dtype == torch.uint8:
        values = values.view(torch.float4_e2m1fn_x2)
    got = convert_weight(values, scale, format, to, weight_global_scale=global_scale)
    assert got.error == expected.error and torch.equal(as_bytes(got.weight), as_bytes(expected.weight))


def test_no_experts_and_zero_weights() -> None:
    for num_experts in (0, 2):
        values, scale, global_scale = quantize_weight(torch.zeros(num_experts, 32, 64), "nvfp4")
        converted = convert_weight(values, scale, "nvfp4", "mxfp4", weight_global_scale=global_scale)
        assert converted.weight.shape == (num_experts, 32, 32) and converted.error == 0.0


# ---- fold_global_scale -----------------------------------------------------------------------------------------------

# Standard deviation of the weights -> what folding the global scale into UE4M3 costs, as measured (docs/formats.md).
FOLDING = {0.005: 0.28, 0.01: 0.17, 0.02: 0.086, 0.05: 0.033, 0.5: 0.025}


@pytest.mark.parametrize("std", FOLDING)
def test_s2_18_folding_costs_2_to_21_percent(std: float) -> None:
    weight = normal_weight(std, 4, 512, 1024)
    values, scale, global_scale = quantize_weight(weight, "nvfp4")
    x = NVFP4.dequantize(values, scale, NVFP4.weight_block, global_scale)
    assert abs(relative_error(x, weight) - 0.095) < 0.001  # FP4 itself
    folded = fold_global_scale(values, scale, global_scale)
    assert folded.weight is values and folded.global_scale is None
    back = NVFP4.dequantize(folded.weight, folded.scale, NVFP4.weight_block)
    assert math.isclose(folded.error.item(), relative_error(back, x), rel_tol=1e-6)
    assert math.isclose(folded.error.item(), FOLDING[std], rel_tol=0.05)


def test_s2_18_gate_and_up_keep_their_own_global_scale() -> None:
    """Checkpoints exist whose gate and up scales differ 10 x. One for both, the wrong way, is far worse than FP4."""
    weight = normal_weight(0.02, 3, 256, 256)
    weight[:, 128:] *= 10
    values, scale, global_scale = quantize_weight(weight, "nvfp4", parts=2)
    x = NVFP4.dequantize(values, scale, NVFP4.weight_block, global_scale, 2)
    assert (global_scale[:, 1] / global_scale[:, 0] > 8).all()
    taken_for_both = NVFP4.dequantize(values, scale, NVFP4.weight_block, global_scale[:, 0])
    assert relative_error(taken_for_both[:, 128:], x[:, 128:]) > 0.85
    shared = global_scale.amax(1)
    merged = fold_global_scale(values, scale, global_scale, into=shared, parts=2)
    assert merged.global_scale is shared and merged.error < 0.01
    back = NVFP4.dequantize(values, merged.scale, NVFP4.weight_block, shared)
    assert torch.equal(back[:, 128:], x[:, 128:])  # into the larger one: nothing changes there
    assert 0.015 < relative_error(back[:, :128], x[:, :128]) < 0.04
    same = fold_global_scale(values, scale, global_scale, into=global_scale, parts=2)
    assert same.error == 0 and torch.equal(as_bytes(same.scale), as_bytes(scale))


# ---- the order of w13 ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(["gate_up", "up_gate", "interleaved"]),
    group=st.sampled_from([1, 8, 16]),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16]),
)
def test_s3_6_orders_of_w13_round_trip(layout: str, group: int, groups: int, dtype: torch.dtype) -> None:
    rows = 2 * group * groups
    w13 = torch.randint(0, 120, (2, rows, 3)).to(torch.uint8)
    w13 = w13.to(dtype) if dtype == torch.bfloat16 else w13.view(dtype)
    other = from_gate_up(w13, layout, group=group)
    assert torch.equal(as_bytes(to_gate_up(other, layout, group=group)), as_bytes(w13))
    again = from_gate_up(to_gate_up(w13, layout, group=group), layout, group=group)
    assert torch.equal(as_bytes(again), as_bytes(w13))


def test_s3_6_interleaved_rows_by_hand() -> None:
    rows = torch.arange(8).view(1, 8, 1)  # gate 0 to 3, up 4 to 7
    assert from_gate_up(rows, "interleaved").flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert from_gate_up(rows, "interleaved", group=2).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert from_gate_up(rows, "up_gate").flatten().tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    values, scale, global_scale = quantize_weight(torch.ones(2, 32, 64), "nvfp4", parts=2)
    calls = [
        lambda: convert_weight(values, scale, "fp4", "mxfp4"),
        lambda: convert_weight(values, scale, "nvfp4", "mxfp5"),
        lambda: convert_weight(values[0], scale, "nvfp4", "mxfp4"),
        lambda: convert_weight(values, scale, "mxfp4", "nvfp4"),
        lambda: convert_weight(values.view(torch.int8), scale, "nvfp4", "mxfp4"),
        lambda: convert_weight(values, scale.float(), "nvfp4", "mxfp4"),
        lambda: convert_weight(values, scale, "nvfp4", "mxfp4", weight_global_scale=global_scale),
        lambda: fold_global_scale(values, scale, global_scale, into=global_scale[:1], parts=2),
        lambda: from_gate_up(torch.zeros(1, 6, 2), "interleaved", group=2),
        lambda: from_gate_up(torch.zeros(1, 6, 2), "rows"),
    ]
    lines = []
    for call in calls:
        with pytest.raises(RuntimeError) as caught:
            call()
        lines.append(str(caught.value))
    assert_expected_inline(
        "\n".join(lines),
        """\
convert_weight: format: expected one of bf16, fp16, int8, fp8_block, fp8_block_e8m0, mxfp8, mxfp4, nvfp4, got fp4
convert_weight: to: expected one of bf16, fp16, int8, fp8_block, fp8_block_e8m0, mxfp8, mxfp4, nvfp4, got mxfp5
convert_weight: weight: expected [E, N, K/pack], got [32, 32]
convert_weight: weight_scale: expected float8_e8m0fnu or uint8 [2, 32, 2] on cpu, got float8_e4m3fn [2, 32, 4] on cpu
convert_weight: weight: expected uint8 or float4_e2m1fn_x2 [2, 32, 32] on cpu, got int8 [2, 32, 32] on cpu
convert_weight: weight_scale: expected float8_e4m3fn [2, 32, 4] on cpu, got float32 [2, 32, 4] on cpu
convert_weight: weight_global_scale: expected float32 [2, 1] on cpu, got float32 [2, 2] on cpu
fold_global_scale: into: expected float32 [2, 2] on cpu, got float32 [1, 2] on cpu
from_gate_up: tensor: expected [E, rows, ...], rows a multiple of 4, got [1, 6, 2]
from_gate_up: layout: expected one of gate_up, up_gate, interleaved, got rows""",
    )


def test_packed_scales_are_refused() -> None:
    values, scale, global_scale = quantize_weight(torch.randn(2, 128, 64), "nvfp4")
    atoms = moe.pack_scale(scale, "atom")
    message = r"weight_scale: expected \[E, N, K / block_k\], which unpack_scale gives, got \[2, 1, 1, 32, 4, 4\]$"
    with pytest.raises(RuntimeError, match=f"^convert_weight: {message}"):
        convert_weight(values, atoms, "nvfp4", "mxfp4", weight_global_scale=global_scale)
    with pytest.raises(RuntimeError, match=f"^fold_global_scale: {message}"):
        fold_global_scale(values, atoms, global_scale)
    with pytest.raises(RuntimeError, match="^fold_global_scale: weight_global_scale: expected float32 .*, got None$"):
        fold_global_scale(values, scale, None)


def test_a_given_global_scale_is_one_for_each_part() -> None:
    weight = torch.randn(2, 64, 32)
    values, scale, global_scale = quantize_weight(weight, "nvfp4", parts=2, global_scale=torch.tensor(0.5))
    assert torch.equal(global_scale, torch.full((2, 2), 0.5))
    assert relative_error(NVFP4.dequantize(values, scale, NVFP4.weight_block, global_scale, 2), weight) < 0.2
    with pytest.raises(RuntimeError, match="^quantize_weight: global_scale: expected none for bf16, got "):
        quantize_weight(weight, "bf16", global_scale=torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="^quantize_weight: parts: expected a divisor of 64 rows, got 0$"):
        quantize_weight(weight, "mxfp4", parts=0)


def test_parameters_fold_as_tensors_do() -> None:
    weight = quantize_weight(normal_weight(0.02, 2, 64, 64), NVFP4)
    parameters = [torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) for tensor in weight]
    for folded, expected in zip(fold_global_scale(*parameters), fold_global_scale(*weight), strict=True):
        assert folded is expected or torch.equal(torch.as_tensor(folded).float(), torch.as_tensor(expected).float())
