"""The block-scaled formats as a whole, row by row of the requirements of NVFP4 and MX layers (test_sN_M...).

Layouts are in ops/test_pack_scale.py and test_host.py, quantisers in test_formats.py, conversions in
test_conversions.py, checkpoints in test_checkpoints.py. What is left: the GEMM's use of scales, the diagnostics that
find a wrong layout, the layer's slot semantics, sizes, and refusals.
"""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from moe_cases import make_moe
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS, encode_e4m3, encode_e8m0, quantize_weight

NVFP4 = FORMATS["nvfp4"]
# DeepSeek-V4-Pro on one of 8 ranks.
LOCAL, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 48, 384, 6, 7168, 3072


def wide_matrix(rows: int, k: int, seed: int) -> Tensor:
    """Blocks of 16 whose magnitudes differ by up to 2^6, so that a misplaced scale shows."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(0, 7, (rows, k // 16), generator=generator)
    return torch.randn(rows, k, generator=generator) * 2.0 ** exponent.repeat_interleave(16, 1)


def operands(m: int = 40, n: int = 130, k: int = 448) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, a_scale [m, k/16] and b, b_scale [n, k/16], nvfp4 without global scales."""
    return *moe.quantize(wide_matrix(m, k, 0), "nvfp4"), *moe.quantize(wide_matrix(n, k, 1), "nvfp4")


def gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, **options: object) -> Tensor:
    """One expert, float32 out."""
    offsets = torch.tensor([0, len(a)]).int()
    options = {"format": "nvfp4", "out_dtype": torch.float32} | options
    return moe.grouped_gemm(a, b[None], offsets, a_scale=a_scale, b_scale=b_scale[None], **options)


def exact(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    a, b = (NVFP4.dequantize(values, scale, (1, 16)).double() for values, scale in ((a, a_scale), (b, b_scale)))
    return a @ b.T


def cosine(x: Tensor, y: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(x.double().flatten(), y.double().flatten(), dim=0).item()


# ---- S2-21: the diagnostics ------------------------------------------------------------------------------------------


def test_s2_21_all_scales_one() -> None:
    """Codes alone: products are multiples of 1/4 and their sums small, so float32 is exact. Cosine 1.0."""
    a, a_scale, b, b_scale = operands()
    ones = [torch.ones_like(scale.float()).to(scale.dtype) for scale in (a_scale, b_scale)]
    out = gemm(a, ones[0], b, ones[1])
    assert torch.equal(out.double(), exact(a, ones[0], b, ones[1]))
    x = torch.randn(200, 512)
    values, scale = moe.quantize(x, "nvfp4")
    noise = (NVFP4.dequantize(values, scale, (1, 16)) - x).square().mean().item()
    assert 0.005 < noise < 0.015  # what FP4 costs: 9.5 % of the norm


def test_s2_21_real_scales() -> None:
    """Through the packed layout and back, the product is the dequantised one to float32 rounding: cosine 1, MSE 0."""
    a, a_scale, b, b_scale = operands()
    packed = [moe.pack_scale(scale, "atom") for scale in (a_scale, b_scale)]
    a_back, b_back = (
        moe.unpack_scale(atoms, "atom", *scale.shape, scale.dtype)
        for atoms, scale in zip(packed, (a_scale, b_scale), strict=True)
    )
    out, expected = gemm(a, a_back, b, b_back), exact(a, a_scale, b, b_scale)
    assert cosine(out, expected) > 1 - 1e-12
    assert ((out - expected).norm() / expected.norm()) < 1e-6


def test_s2_21_a_broken_remap_shows() -> None:
    """Cosine 0.83 was the trace of scales that landed at k block 0 only; row-major bytes taken for atoms are as bad."""
    a, a_scale, b, b_scale = operands(m=128, n=128)
    expected = exact(a, a_scale, b, b_scale)
    first_only = b_scale[:, :1].expand_as(b_scale).contiguous()
    not_remapped = moe.unpack_scale(b_scale.view(1, 7, 32, 4, 4), "atom", 128, 28, b_scale.dtype)
    for wrong in (first_only, not_remapped):
        assert cosine(gemm(a, a_scale, b, wrong), expected) < 0.9


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("m, k", [(1, 0), (32, 0), (128, 0), (0, 1), (0, 4), (0, 100)])
def test_s2_5_probes_through_the_gemm(side: str, m: int, k: int) -> None:
    """One scale doubled changes one row (of a) or one column (of b) of the output, by exactly that block's products."""
    a, _, b, _ = operands(m=130, n=130, k=1792)
    scales = {"a": torch.ones(130, 112), "b": torch.ones(130, 112)}
    before = gemm(a, scales["a"].to(torch.float8_e4m3fn), b, scales["b"].to(torch.float8_e4m3fn))
    scales[side][m, k] = 2.0
    after = gemm(a, scales["a"].to(torch.float8_e4m3fn), b, scales["b"].to(torch.float8_e4m3fn))
    ones = torch.ones(130, 1).to(torch.float8_e4m3fn)
    block = slice(8 * k, 8 * k + 8)  # bytes of 16 codes
    change = exact(a[:, block].contiguous(), ones, b[:, block].contiguous(), ones)
    expected = torch.zeros_like(change)
    expected[(slice(m, m + 1), slice(None)) if side == "a" else (slice(None), slice(m, m + 1))] = 1.0
    assert torch.equal((after - before).double(), change * expected)


# ---- the layer -------------------------------------------------------------------------------------------------------


def test_s2_1_deepseek_v4_pro_shapes() -> None:
    """GEMM1 is M x 6144 x 7168 and GEMM2 M x 7168 x 3072; the layer's fakes take the rank's whole share."""
    values, scale, global_scale = quantize_weight(torch.randn(1, 2 * INTERMEDIATE, HIDDEN).bfloat16(), "nvfp4", parts=2)
    assert values.shape == (1, 6144, 3584) and scale.shape == (1, 6144, 448) and global_scale.shape == (1, 2)
    x = torch.randn(3, HIDDEN)
    a, a_scale = moe.quantize(x, "nvfp4")
    options = {"a_scale": a_scale, "b_scale": scale, "b_global_scale": global_scale, "b_parts": 2, "format": "nvfp4"}
    out = moe.grouped_gemm(a, values, torch.tensor([0, 3]).int(), out_dtype=torch.float32, **options)
    weight = NVFP4.dequantize(values, scale, (1, 16), global_scale, 2)[0]
    expected = NVFP4.dequantize(a, a_scale, (1, 16)) @ weight.T
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
    del values, weight
    meta = {"device": "meta"}
    layer = moe.Experts(
        torch.empty(LOCAL, 2 * INTERMEDIATE, HIDDEN // 2, dtype=torch.uint8, **meta),
        torch.empty(LOCAL, HIDDEN, INTERMEDIATE // 2, dtype=torch.uint8, **meta),
        w13_scale=torch.empty(LOCAL, 2 * INTERMEDIATE, HIDDEN // 16, dtype=torch.float8_e4m3fn, **meta),
        w2_scale=torch.empty(LOCAL, HIDDEN, INTERMEDIATE // 16, dtype=torch.float8_e4m3fn, **meta),
        w13_global_scale=torch.empty(LOCAL, 2, **meta),
        w2_global_scale=torch.empty(LOCAL, **meta),
        expert_map=torch.empty(EXPERTS, dtype=torch.int32, **meta),
        format="nvfp4",
    )
    tokens = 8192
    hidden_states = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, **meta)
    ids = torch.empty(tokens, TOP_K, dtype=torch.int32, **meta)
    assert layer(hidden_states, torch.empty(tokens, TOP_K, **meta), ids).shape == (tokens, HIDDEN)


def test_s2_2_weights_and_s2_9_no_transpose() -> None:
    """[E, N, K/2] with the even k in the low nibble, scales [E, N, K/16]: the checkpoint's own layout goes in."""
    codes = torch.tensor([[[2, 4, 0, 0] + [0] * 28] * 2])  # 1.0 at k 0, 2.0 at k 1
    b = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    assert b[0, 0, 0] == 0x42
    a = torch.zeros(2, 32)
    a[0, 0], a[1, 1] = 1.0, 1.0
    b_scale = torch.ones(1, 2, 2).to(torch.float8_e4m3fn)
    offsets = torch.tensor([0, 2]).int()
    out = moe.grouped_gemm(a.bfloat16(), b, offsets, b_scale=b_scale, format="nvfp4", act_format="bf16")
    assert out.tolist() == [[1.0, 1.0], [2.0, 2.0]]


def test_s2_12_absent_slots_and_s2_14_weights_once() -> None:
    """A slot of -1 adds nothing; twice the weight, or twice the factor, is twice the output, not four times."""
    call = make_moe("nvfp4", num_tokens=9, top_k=3)
    base = call(moe.fused_moe).float()
    topk_weights, topk_ids = call.args[3:]
    doubled = call.but(*call.args[:3], topk_weights * 2)(moe.fused_moe).float()
    factor = call(moe.fused_moe, routed_scaling_factor=2.0).float()
    assert torch.equal(doubled, factor) and torch.equal(factor, 2 * base)
    some, others = topk_ids.clone(), topk_ids.clone()
    some[:, 1], others[:, 0], others[:, 2] = -1, -1, -1
    parts = [call.but(*call.args[:4], ids)(moe.fused_moe).float() for ids in (some, others)]
    torch.testing.assert_close(parts[0] + parts[1], base, rtol=2.0**-6, atol=2.0**-7 * float(base.abs().max()))


def test_s2_13_the_activation_is_per_slot() -> None:
    """silu(sum of gates) * sum of ups is another number than the sum of silu(gate) * up; ours is the second."""
    call = make_moe("nvfp4", num_tokens=6, hidden_size=64, intermediate_size=32, act_format="bf16")
    x, w13, w2, topk_weights, topk_ids = call.args
    w13 = NVFP4.dequantize(w13, call.options["w13_scale"], (1, 16), call.options["w13_global_scale"], 2).double()
    w2 = NVFP4.dequantize(w2, call.options["w2_scale"], (1, 16), call.options["w2_global_scale"]).double()
    gate_up = torch.einsum("th,tknh->tkn", x.double(), w13[topk_ids.long()])
    gate, up = gate_up.chunk(2, -1)
    weights = topk_weights.double()[..., None]
    per_slot = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(gate) * up, w2[topk_ids.long()])
    right = (weights * per_slot).sum(1)
    summed = torch.nn.functional.silu((weights * gate).sum(1)) * (weights * up).sum(1)
    wrong = torch.einsum("ti,tkhi->thk", summed, w2[topk_ids.long()]).mean(-1)
    output = call(moe.fused_moe).double()
    assert (output - right).norm() / right.norm() < 0.01
    assert (output - wrong).norm() / wrong.norm() > 0.3


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "nvfp4", "fp8_block", "fp8_block_e8m0"])
def test_s3_1_both_sides_quantised(format: str) -> None:
    """Every block-scaled product is that of the dequantised numbers, to float32 rounding, for ragged N and K."""
    fmt = FORMATS[format]
    a, a_scale = moe.quantize(wide_matrix(33, 400, 2), format)
    b, b_scale, b_global_scale = quantize_weight(wide_matrix(130, 400, 3).unflatten(0, (1, 130)), format)
    options = {"a_scale": a_scale, "b_scale": b_scale, "b_global_scale": b_global_scale, "format": format}
    out = moe.grouped_gemm(a, b, torch.tensor([0, 33]).int(), out_dtype=torch.float32, **options)
    weight = fmt.dequantize(b, b_scale, fmt.weight_block, b_global_scale)[0].double()
    expected = fmt.dequantize(a, a_scale, fmt.act_block).double() @ weight.T
    assert (out - expected).norm() / expected.norm() < 1e-6


def test_s2_24_staging_is_fused() -> None:
    """permute and act_mul write what quantize gives for the same numbers, bit for bit: values and scales."""
    x = wide_matrix(7, 192, 4).bfloat16()
    for format in ("nvfp4", "mxfp4", "mxfp8", "fp8_block_e8m0"):
        given = {"global_scale": moe.compute_global_scale(x)} if format == "nvfp4" else {}
        values, scale = moe.quantize(x, format, **given)
        permuted, permuted_scale = moe.permute(x, torch.arange(7).int().view(7, 1), 7, format=format, **given)
        assert torch.equal(permuted.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(permuted_scale.view(torch.uint8), scale.view(torch.uint8))
        gate_up = torch.cat([x.float().relu(), torch.ones(7, 192)], 1)
        act, act_scale = moe.act_mul(gate_up, torch.tensor([0, 7]).int(), activation="relu", format=format, **given)
        values, scale = moe.quantize(x.float().relu(), format, **given)
        assert torch.equal(act.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(act_scale.view(torch.uint8), scale.view(torch.uint8))


# ---- numbers and sizes -----------------------------------------------------------------------------------------------


def test_computed_global_scales() -> None:
    """amax / (6 * 448): the largest block scale is 448 and nothing saturates; a zero matrix has 1, and gives no NaN."""
    x = torch.randn(2, 8, 64) * torch.tensor([1e-6, 1e6]).view(2, 1, 1)
    global_scale = moe.compute_global_scale(x)
    assert global_scale.shape == (2, 1) and global_scale.dtype == torch.float32
    for matrix, g in zip(x, global_scale, strict=True):
        values, scale = moe.quantize(matrix, "nvfp4", global_scale=g)
        assert scale.float().max() == 448
        back = NVFP4.dequantize(values, scale, (1, 16), g)
        assert (back - matrix).norm() / matrix.norm() < 0.11
    zero = torch.zeros(3, 32)
    assert moe.compute_global_scale(zero).tolist() == [1.0]
    values, scale = moe.quantize(zero, "nvfp4", global_scale=moe.compute_global_scale(zero))
    assert not NVFP4.dequantize(values, scale, (1, 16)).any()
    assert moe.compute_global_scale(torch.empty(0, 32)).tolist() == [1.0]
    assert moe.compute_global_scale(torch.randn(2, 6, 32), parts=2).shape == (2, 2)
    with pytest.raises(RuntimeError) as caught:
        moe.compute_global_scale(torch.randn(3, 32), parts=2)
    assert_expected_inline(
        str(caught.value), """compute_global_scale: x: expected [..., a multiple of 2, k], got [3, 32]"""
    )


def test_s4_4_how_scales_are_rounded() -> None:
    """UE8M0: up to the next power of two, saturating; UE4M3: the nearest e4m3, saturating."""
    x = torch.tensor([1.0, 1.0001, 1.5, 2.0, 3.0, 3.4e38])
    assert encode_e8m0(x).view(torch.uint8).tolist() == [127, 128, 128, 128, 129, 254]
    assert encode_e4m3(torch.tensor([1.0, 1.06, 1.07, 500.0])).float().tolist() == [1.0, 1.0, 1.125, 448.0]


def test_s4_6_scale_buffers_follow_k_over_16() -> None:
    sizes = {format: moe.workspace_bytes(100, 512, 256, 8, 2, format) for format in ("nvfp4", "mxfp4")}
    rows = 200
    assert sizes["nvfp4"] - sizes["mxfp4"] == rows * (512 // 16 - 512 // 32) + rows * (256 // 16 - 256 // 32)


# ---- S2-10: scales packed at load time -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "mxfp8"])
def test_s2_10_s2_11_packed_weight_scales_are_the_same_numbers(format: str) -> None:
    call = make_moe(format, num_tokens=7)
    packed = {name: moe.pack_scale(call.options[name], "atom") for name in ("w13_scale", "w2_scale")}
    assert torch.equal(call(moe.fused_moe, **packed), call(moe.fused_moe))
    as_bytes = {name: scale.view(torch.uint8) for name, scale in packed.items()}
    if format != "nvfp4":
        assert torch.equal(call(moe.fused_moe, **as_bytes), call(moe.fused_moe))


# ---- refusals --------------------------------------------------------------------------------------------------------


def refusal(function: object, *args: object, **options: object) -> str:
    with pytest.raises(RuntimeError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_s4_3_one_scale_format_in_an_mma() -> None:
    """The instruction has one bit for the scale format of both operands, so mixtures are refused, by name."""
    a, a_scale, b, b_scale = operands()
    mx, mx_scale = moe.quantize(wide_matrix(40, 448, 0), "mxfp4")
    lines = [
        refusal(gemm, mx, mx_scale, b, b_scale, act_format="mxfp4"),
        refusal(gemm, a, a_scale, b, b_scale, format="mxfp4", act_format="nvfp4"),
        refusal(gemm, a, encode_e8m0(a_scale.float()), b, b_scale),
        refusal(gemm, a, mx_scale, b, b_scale),
        refusal(gemm, a, a_scale, b, encode_e8m0(b_scale.float())),
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
grouped_gemm: act_format: expected nvfp4 or bf16 or fp16 or fp8_block or fp8_block_e8m0 for nvfp4 weights, got mxfp4
grouped_gemm: act_format: expected mxfp4 or bf16 or fp16 or mxfp8 or fp8_block or fp8_block_e8m0 for mxfp4 weights, got nvfp4
grouped_gemm: a_scale: expected float8_e4m3fn [40, 28] on cpu, got float8_e8m0fnu [40, 28] on cpu
grouped_gemm: a_scale: expected float8_e4m3fn [40, 28] on cpu, got float8_e8m0fnu [40, 14] on cpu
grouped_gemm: b_scale: expected float8_e4m3fn [1, 130, 28] on cpu, got float8_e8m0fnu [1, 130, 28] on cpu""",  # noqa: E501
    )


def test_s4_9_nothing_changes_its_format_unasked_and_s4_11_mistakes_have_names() -> None:
    call = make_moe("nvfp4", num_tokens=3)
    packed = moe.pack_scale(call.options["w13_scale"], "atom")
    x, w13 = call.args[:2]
    lines = [
        refusal(call, moe.fused_moe, format="mxfp4"),  # another format
        refusal(call.but(x, w13.view(torch.int8)), moe.fused_moe),  # wrong packing dtype
        refusal(call.but(x, w13.view(torch.int32)), moe.fused_moe),
        refusal(call, moe.fused_moe, w13_scale=call.options["w13_scale"].view(torch.uint8)),
        refusal(call, moe.fused_moe, w13_scale=call.options["w13_scale"][..., ::2]),  # scales of blocks of 32
        refusal(call, moe.fused_moe, w13_scale=packed[:, :0]),  # atoms of another size
        refusal(call, moe.fused_moe, w13_global_scale=torch.ones(5, 3)),
        refusal(call, moe.fused_moe, w13_global_scale=torch.ones(5, 2).half()),
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
fused_moe: w13_scale: expected float8_e8m0fnu or uint8 [5, 192, 5] on cpu, got float8_e4m3fn [5, 192, 10] on cpu
fused_moe: w13: expected uint8 or float4_e2m1fn_x2 [5, 192, 80] on cpu, got int8 [5, 192, 80] on cpu
fused_moe: w13: expected uint8 or float4_e2m1fn_x2 [5, 192, 80] on cpu, got int32 [5, 192, 20] on cpu
fused_moe: w13_scale: expected float8_e4m3fn [5, 192, 10] on cpu, got uint8 [5, 192, 10] on cpu
fused_moe: w13_scale: expected float8_e4m3fn [5, 192, 10] on cpu, got float8_e4m3fn [5, 192, 5] on cpu
fused_moe: w13_scale: expected float8_e4m3fn or uint8 [5, 2, 3, 32, 4, 4] on cpu, got float8_e4m3fn [5, 0, 3, 32, 4, 4] on cpu
fused_moe: w13_global_scale: expected float32 [5, 2] on cpu, got float32 [5, 3] on cpu
fused_moe: w13_global_scale: expected float32 [5, 2] on cpu, got float16 [5, 2] on cpu""",  # noqa: E501
    )
