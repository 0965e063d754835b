"""fused_moe of packed weights by activations that are quantised, then multiplied as bf16, as what they stand for.

The yardstick: the stages one by one, of which `permute` and `act_mul` quantise; their numbers, dequantised by torch,
are given to the grouped GEMM as bf16 ones. The same bits are asked for.
"""

from __future__ import annotations

import pytest
import torch
from gpu_layers import DEVICE, LAYER, layer, overload, why_not, with_ids, with_tactic
from moe_cases import Call
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS
from torch_moe_ops.packed_weights import ROUNDED_ACTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PRODUCTS = [f"{format} x {act_format}" for format, acts in ROUNDED_ACTS.items() for act_format in acts]
TACTICS = ("split64", "split128", "split256", "gated32", "gated64", "gated32+gemm2", "gated64+gemm2")
NUM_EXPERTS, TOP_K = LAYER["num_experts"], LAYER["top_k"]
OPTIONS = {
    "plain": {},
    "bias": {"bias": True, "activation": "silu", "alpha": 1.702, "beta": 1.0, "limit": 7.0, "w13_layout": "up_gate"},
    "fp16": {"dtype": torch.float16, "routed_scaling_factor": 2.5},
    "gelu": {"activation": "gelu_tanh"},
}


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest) -> str:
    if reason := why_not("cutlass_sm90"):
        pytest.skip(f"cutlass_sm90: {reason}")
    return request.param


def rounded(values: Tensor, scale: Tensor, act_format: str, used: int) -> Tensor:
    """What quantised rows stand for, without their global scale, as bf16; only `used` rows are written."""
    fmt = FORMATS[act_format]
    numbers = fmt.dequantize(values, scale, fmt.act_block)
    numbers[used:] = float("nan")
    if act_format == "fp8_block":  # its scales have 24 bits, and infinities become the largest number
        largest = torch.finfo(torch.bfloat16).max
        return numbers.clamp(-largest, largest).bfloat16()
    assert torch.equal(numbers.bfloat16().float().nan_to_num(), numbers.nan_to_num())
    return numbers.bfloat16()


def by_stages(call: Call) -> Tensor:
    x, w13, w2, topk_weights, topk_ids = call.args
    o, (num_slots,) = call.options, call.args[4].flatten().shape
    offsets, slot_to_row, _ = moe.sort_slots(topk_ids, w13.shape[0])
    used = int(offsets[-1])
    expert = (
        torch.searchsorted(offsets, torch.arange(num_slots, device=DEVICE), right=True)
        .sub(1)
        .clamp(max=w13.shape[0] - 1)
    )

    def gemm(name: str, a: Tensor, weight: Tensor, global_scale: Tensor | None, **options: object) -> Tensor:
        product = torch.ops.moe.grouped_gemm.cutlass_sm90(
            a,
            weight,
            offsets,
            bias=o.get(f"{name}_bias"),
            b_global_scale=o[f"{name}_global_scale"],
            format=o["format"],
            act_format="bf16",
            **options,
        )
        if global_scale is None:
            return product
        return product * (global_scale if global_scale.numel() == 1 else global_scale[expert][:, None])

    scales = [o.get(name) for name in ("a13_global_scale", "a2_global_scale")]
    quantised = moe.permute(
        x, slot_to_row, num_slots, format=o["act_format"], global_scale=scales[0], expert_offsets=offsets
    )
    layout, gated = o.get("w13_layout", "gate_up"), not o["activation"].endswith("_no_mul")
    gate_up = gemm(
        "w13", rounded(*quantised, o["act_format"], used), w13, scales[0], b_parts=1 + gated, out_dtype=torch.float32
    )
    numbers = {name: o[name] for name in ("alpha", "beta", "limit") if name in o}
    quantised = moe.act_mul(
        gate_up,
        offsets,
        activation=o["activation"],
        layout=layout,
        format=o["act_format"],
        global_scale=scales[1],
        **numbers,
    )
    expert_out = gemm("w2", rounded(*quantised, o["act_format"], used), w2, scales[1], out_dtype=x.dtype)
    factor = o.get("routed_scaling_factor", 1.0)
    return moe.finalize(expert_out.to(x.dtype), slot_to_row, topk_weights=topk_weights, routed_scaling_factor=factor)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_tokens", [1, 33, 300])
def test_bits_of_the_stages(product: str, num_tokens: int, options: str) -> None:
    call = layer(product, num_tokens, **OPTIONS[options])
    expected = by_stages(call)
    assert expected.isfinite().all() and expected.any()
    for tactic in TACTICS[3 * (num_tokens * TOP_K > 384) :]:
        assert torch.equal(with_tactic(call, tactic), expected), tactic


@pytest.mark.parametrize("num_tokens", [1, 33, 300])
@pytest.mark.parametrize("count", [1, NUM_EXPERTS])
def test_global_scales_of_activations(num_tokens: int, count: int) -> None:
    """Powers of two, so that it makes no difference where they are multiplied."""
    if reason := why_not("cutlass_sm90"):
        pytest.skip(f"cutlass_sm90: {reason}")
    g = torch.Generator(DEVICE).manual_seed(3)
    scales = {
        f"a{gemm}_global_scale": torch.randint(-9, -3, (count,), generator=g, device=DEVICE).float().exp2()
        for gemm in (13, 2)
    }
    call = layer("nvfp4 x nvfp4", num_tokens, **scales)
    expected = by_stages(call)
    for tactic in TACTICS[3 * (num_tokens * TOP_K > 384) :]:
        assert torch.equal(with_tactic(call, tactic), expected), tactic


def test_global_scales_that_saturate_others() -> None:
    """Block scales are e4m3, up to 448: with a small global scale those of large numbers are clipped."""
    if reason := why_not("cutlass_sm90"):
        pytest.skip(f"cutlass_sm90: {reason}")
    scales = {f"a{gemm}_global_scale": torch.tensor([0.0007], device=DEVICE) for gemm in (13, 2)}
    call = layer("nvfp4 x nvfp4", 33, **scales)
    output, expected = call(overload("cutlass_sm90")), call(overload("reference"))
    assert ((output - expected).float().norm() / expected.float().norm()).item() < 5e-3
    without = call.but(a13_global_scale=None, a2_global_scale=None)(overload("cutlass_sm90"))
    assert ((output - without).float().norm() / without.float().norm()).item() > 0.1


@pytest.mark.parametrize("options", [{"w13_layout": "interleaved"}, {"activation": "relu2_no_mul"}], ids=str)
def test_bits_where_the_gemms_are_two_launches(product: str, options: dict[str, str]) -> None:
    call = layer(product, 33, **options)
    assert torch.equal(call(overload("cutlass_sm90")), by_stages(call))


@pytest.mark.parametrize("num_tokens", [5, 300])
@pytest.mark.parametrize("intermediate_size", [64, 448])
def test_channels_that_end_inside_a_tile(product: str, num_tokens: int, intermediate_size: int) -> None:
    """A tile of GEMM1 has 128 channels; what lies past the last one must not reach a scale."""
    call = layer(product, num_tokens, intermediate_size=intermediate_size)
    expected = by_stages(call)
    for tactic in TACTICS[3 * (num_tokens * TOP_K > 384) :]:
        assert torch.equal(with_tactic(call, tactic), expected), tactic


def test_absent_slots_zeros_and_large_numbers(product: str) -> None:
    call = layer(product, 33)
    x, ids = call.args[0].clone(), call.args[4].clone()
    x[3] = 0
    x[4, ::2] = 0
    x[5] *= 1e30
    x[6, 7] = 1e4
    ids[7], ids[8:12, ::3] = -1, -1
    call = with_ids(call.but(x), ids)
    expected = by_stages(call)
    for tactic in TACTICS:
        output = with_tactic(call, tactic)
        assert torch.equal(output.nan_to_num(), expected.nan_to_num()), tactic
    assert not expected[3].any() and not expected[7].any()


@pytest.mark.parametrize("channels", [3, 16, 128])
def test_channels_that_are_nan(product: str, channels: int) -> None:
    """Scales ignore NaN, also where a whole block of channels has nothing else."""
    call = layer(product, 33, bias=True)
    bias = call.options["w13_bias"].clone()
    bias[5, :channels] = float("nan")
    call = call.but(w13_bias=bias)
    expected = by_stages(call)
    for tactic in TACTICS:
        output = with_tactic(call, tactic)
        assert torch.equal(output.isnan(), expected.isnan()), tactic
        assert torch.equal(output.nan_to_num(), expected.nan_to_num()), tactic
