"""grouped_gemm and fused_moe in every pair of formats that the portable backend multiplies."""

import pytest
import torch
from exact_operands import COMBINATIONS, Operands
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import make_moe

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS, quantize_weight
from torch_moe_ops.reference.fused_moe import fused_moe as reference_fused_moe
from torch_moe_ops.reference.grouped_gemm import grouped_gemm as reference

pytest.importorskip("triton")

from torch_moe_ops.triton.fused_moe import fused_moe  # noqa: E402
from torch_moe_ops.triton.grouped_gemm import grouped_gemm, scaled  # noqa: E402

OFFSETS = [0, 5, 5, 75, 80]


@pytest.mark.parametrize("format, act_format", COMBINATIONS)
def test_every_combination(format, act_format):
    """K ends inside a block of every size, the second part begins inside a tile, some of the rows are not in use."""
    operands = Operands(format, act_format, OFFSETS, 83, 144, 216, parts=2, expert_rows=[3, 0, 66, 5])
    operands.check(grouped_gemm(*operands.arguments, **operands.options))
    operands.check(reference(*operands.arguments, **operands.options))


@pytest.mark.parametrize("format, act_format", [("nvfp4", "nvfp4"), ("mxfp4", "fp8_block"), ("bf16", "bf16")])
def test_expert_rows_are_clamped_to_the_experts_range(format, act_format):
    operands = Operands(format, act_format, OFFSETS, 83, 40, 64, expert_rows=[0, 0, 70, 5])
    operands.options["expert_rows"] = torch.tensor([-3, 7, 2**31 - 1, 6], dtype=torch.int32)
    operands.check(grouped_gemm(*operands.arguments, **operands.options))


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("k", [256, 216])
def test_scales_in_any_layout(format, k):
    operands = Operands(format, format, [0, 3, 3, 20], 20, 144, k, parts=2)
    a_scale, b_scale = operands.options["a_scale"], operands.options["b_scale"]
    for a, b in (
        (a_scale.t().contiguous().t(), b_scale.mT.contiguous().mT),
        (a_scale, moe.pack_scale(b_scale, "atom")),
        (a_scale.view(torch.uint8) if format != "nvfp4" else a_scale, moe.pack_scale(b_scale, "atom")),
    ):
        operands.check(grouped_gemm(*operands.arguments, **operands.options | {"a_scale": a, "b_scale": b}))


E4M3_CODES = (0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0x7F, 0x80, 0x81, 0xFE, 0xFF)
E8M0_BYTES = (0, 1, 2, 60, 126, 127, 128, 190, 253, 254, 255)


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "nvfp4", "fp8_block_e8m0"])
def test_scales_times_values(format):
    """NaN, infinity, zeros and denormals as the reference has them: each code next to each scale, times one."""
    fmt = FORMATS[format]
    codes = torch.tensor(range(16) if fmt.pack == 2 else E4M3_CODES, dtype=torch.uint8)
    scale_bytes = torch.tensor(range(256) if format == "nvfp4" else E8M0_BYTES, dtype=torch.uint8)
    k = fmt.weight_block[1]
    b = torch.zeros(len(scale_bytes), len(codes), k // fmt.pack, dtype=torch.uint8)
    b[:, :, 0] = codes  # of two values in a byte the second is zero
    scale = scale_bytes.view(-1, 1, 1)
    if fmt.weight_block[0] == 1:  # all in one expert, a scale a row
        b, scale = b.reshape(1, -1, b.shape[-1]), scale.repeat(1, len(codes), 1).reshape(1, -1, 1)
    a = torch.zeros(len(b), k, dtype=torch.bfloat16)
    a[:, 0] = 1.0
    arguments = (a, b.view(fmt.dtype), torch.arange(len(b) + 1, dtype=torch.int32))
    options = {"b_scale": scale.view(fmt.scale_dtype), "format": format, "act_format": "bf16"}
    got, expected = (op(*arguments, **options, out_dtype=torch.float32) for op in (grouped_gemm, reference))
    assert expected.isnan().any() and expected.isfinite().any()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_fp8_block_activations_add_in_k_order(format):
    """2^24 + 1 + 1 + ... in float32 stays 2^24 only when the large block comes first."""
    k, fmt = 5 * 128, FORMATS[format]
    a, b = torch.zeros(1, k), torch.zeros(1, 8, k // 2, dtype=torch.uint8)
    a[:, ::128], b[..., ::64] = 1.0, 0x2  # the code of 1
    b_scale = torch.ones(1, 8, k // fmt.weight_block[1]).to(fmt.scale_dtype)
    for first, expected in ((0, 2.0**24), (4, 2.0**24 + 4)):
        a_scale = torch.ones(1, 5)
        a_scale[0, first] = 2.0**24
        out = grouped_gemm(
            a.to(torch.float8_e4m3fn), b, torch.tensor([0, 1], dtype=torch.int32), a_scale=a_scale, b_scale=b_scale,
            format=format, act_format="fp8_block", out_dtype=torch.float32,
        )  # fmt: skip
        assert out.tolist() == [[expected] * 8]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    combination=st.sampled_from([pair for pair in COMBINATIONS if scaled(pair[0]) == "value"]),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    half_n=st.integers(1, 70),
    half_k=st.integers(1, 150),
    seed=st.integers(0, 2**31),
)
def test_random_numbers_in_random_shapes(combination, sizes, half_n, half_k, seed):
    """float32 sums of K products in any order: each of K + 3 roundings is at most 2^-24 of the sum of |a * b|."""
    (format, act_format), k, rows = combination, 2 * half_k, sum(sizes)
    torch.manual_seed(seed)
    acts, fmt = FORMATS[act_format], FORMATS[format]
    a, a_scale = acts.quantize(torch.randn(rows, k) * torch.randn(rows, 1).exp(), acts.act_block)
    b, b_scale, b_global = quantize_weight(torch.randn(len(sizes), 2 * half_n, k), format, parts=2)
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    out = grouped_gemm(
        a, b, offsets, a_scale=a_scale if acts.has_scale else None, b_scale=b_scale, b_global_scale=b_global,
        format=format, act_format=act_format, b_parts=2, out_dtype=torch.float32,
    )  # fmt: skip
    x = acts.dequantize(a, a_scale, acts.act_block).double().split(sizes)
    w = [
        fmt.dequantize(b[e], b_scale[e], fmt.weight_block, None if b_global is None else b_global[e], 2).double()
        for e in range(len(sizes))
    ]
    exact = torch.cat([x[e] @ w[e].T for e in range(len(sizes))])
    magnitude = torch.cat([x[e].abs() @ w[e].abs().T for e in range(len(sizes))])
    assert ((out - exact).abs() <= (k + 3) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("format, act_format", COMBINATIONS)
def test_fused_moe_passes_everything_on(format, act_format):
    """The first GEMM's inputs have the reference's bits; what differs is the order of sums, which now and then moves a
    rounding of act or expert_out: far less than the unit of bfloat16 in the mean. A lost scale is a multiple of it."""
    call = make_moe(format, act_format=act_format, num_tokens=7, num_experts=3, bias=True)
    if act_format == "nvfp4":
        call = call.but(a13_global_scale=torch.tensor([0.01, 0.002, 0.05]), a2_global_scale=torch.tensor([0.003]))
    got, expected = call(fused_moe).float(), call(reference_fused_moe).float()
    assert (got - expected).norm() <= 2**-8 * expected.norm()


def test_refuses_what_it_does_not_multiply():
    values, scale, _ = quantize_weight(torch.randn(2, 64, 64), "mxfp4")
    packed = moe.pack_weight(values, scale, "mxfp4")
    a, offsets = torch.randn(3, 64).bfloat16(), torch.tensor([0, 1, 3], dtype=torch.int32)
    message = (
        r"^grouped_gemm: backend: expected one that can run this problem, got triton "
        r"\(needs weights as they are stored, got packed ones\)$"
    )
    with pytest.raises(RuntimeError, match=message):
        torch.ops.moe.grouped_gemm.triton(a, packed, offsets, format="mxfp4", act_format="bf16")
