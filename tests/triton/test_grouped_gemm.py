"""grouped_gemm and fused_moe. Small integers and power-of-two scales make float32 sums exact: results must be equal."""

import pytest
import torch

import torch_moe_ops  # noqa: F401  (registers torch.ops.moe)
from torch_moe_ops.formats import FORMATS

ops = torch.ops.moe
ROUTINGS = {"ragged": [0, 5, 5, 75, 80], "hot": [0, 0, 80, 80, 80], "none": [0, 0, 0, 0, 0], "first": [0, 1, 1, 1, 1]}
NUM_ROWS = 83


def integers(shape, generator, low=-4, high=5):
    return torch.randint(low, high, shape, generator=generator).float()


def powers_of_two(shape, generator):
    return torch.randint(-2, 3, shape, generator=generator).float().exp2()


def expected_rows(a, b, offsets, bias=None):
    """float64 [offsets[-1], N]"""
    rows = [a[offsets[e] : offsets[e + 1]].double() @ b[e].double().T for e in range(len(b))]
    if bias is not None:
        rows = [block + bias[e].double() for e, block in enumerate(rows)]
    return torch.cat(rows)


def check(out, expected, out_dtype):
    assert (out.shape[0], out.dtype) == (NUM_ROWS, out_dtype)
    assert torch.equal(out[: len(expected)], expected.to(torch.float32).to(out_dtype))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "format, out_dtype", [("bf16", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_unquantised(format, out_dtype, routing):
    generator = torch.Generator().manual_seed(0)
    offsets, dtype = ROUTINGS[routing], FORMATS[format].dtype
    a, b = integers((NUM_ROWS, 72), generator), integers((4, 136, 72), generator)  # K and N ragged
    bias = integers((4, 136), generator)
    a[offsets[-1] :] = float("nan")
    expert_offsets = torch.tensor(offsets, dtype=torch.int32)
    out = ops.grouped_gemm.triton(
        a.to(dtype), b.to(dtype), expert_offsets, bias=bias.bfloat16(), format=format, out_dtype=out_dtype
    )
    check(out, expected_rows(a, b, offsets, bias), out_dtype)


@pytest.mark.parametrize("b_parts, n", [(1, 136), (2, 320)])  # 320 = 2 * 160: the second part starts inside a tile
@pytest.mark.parametrize("scale_layout", ["k_major", "mn_major"])
@pytest.mark.parametrize("act_format", ["", "bf16", "fp16"])
def test_fp8_block(b_parts, n, scale_layout, act_format):
    generator = torch.Generator().manual_seed(1)
    fmt, offsets, k = FORMATS["fp8_block"], ROUTINGS["ragged"], 200
    a, b = integers((NUM_ROWS, k), generator), integers((4, n, k), generator)
    a_scale = powers_of_two(fmt.act_scale_shape(NUM_ROWS, k), generator)
    b_scale = powers_of_two((4, *fmt.weight_scale_shape(n, k, b_parts)), generator)
    expected_a = a if act_format else fmt.dequantize(a, a_scale, fmt.act_block)
    expected = expected_rows(expected_a, fmt.dequantize(b, b_scale, fmt.weight_block, None, b_parts), offsets)
    a[offsets[-1] :], a_scale[offsets[-1] :] = float("nan"), float("nan")
    if scale_layout == "mn_major":
        a_scale, b_scale = a_scale.t().contiguous().t(), b_scale.mT.contiguous().mT
    out = ops.grouped_gemm.triton(
        a.to(FORMATS[act_format or "fp8_block"].dtype), b.to(fmt.dtype), torch.tensor(offsets, dtype=torch.int32),
        a_scale=None if act_format else a_scale, b_scale=b_scale, b_parts=b_parts,
        format="fp8_block", act_format=act_format, out_dtype=torch.float32,
    )  # fmt: skip
    check(out, expected, torch.float32)


def test_fp8_block_adds_in_k_order():
    """2^24 + 1 + 1 + ... in float32 stays 2^24 only when the large block comes first."""
    k, offsets = 5 * 128, torch.tensor([0, 1], dtype=torch.int32)
    a, b = torch.zeros(1, k), torch.zeros(1, 8, k)
    a[:, ::128], b[..., ::128] = 1.0, 1.0
    for first, expected in ((0, 2.0**24), (4, 2.0**24 + 4)):
        a_scale = torch.ones(1, 5)
        a_scale[0, first] = 2.0**24
        out = ops.grouped_gemm.triton(
            a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), offsets, a_scale=a_scale, b_scale=torch.ones(1, 1, 5),
            format="fp8_block", out_dtype=torch.float32,
        )  # fmt: skip
        assert out.tolist() == [[expected] * 8]


@pytest.mark.parametrize("act_format", ["", "bf16"])
def test_int8(act_format):
    generator = torch.Generator().manual_seed(2)
    offsets, k, n = ROUTINGS["ragged"], 200, 136
    a, b = integers((NUM_ROWS, k), generator, -127, 128), integers((4, n, k), generator, -127, 128)
    a_scale, b_scale = powers_of_two((NUM_ROWS, 1), generator), powers_of_two((4, n, 1), generator)
    expected = expected_rows(a if act_format else a * a_scale, b * b_scale, offsets)
    out = ops.grouped_gemm.triton(
        a.to(torch.bfloat16 if act_format else torch.int8), b.to(torch.int8), torch.tensor(offsets, dtype=torch.int32),
        a_scale=None if act_format else a_scale, b_scale=b_scale,
        format="int8", act_format=act_format, out_dtype=torch.float32,
    )  # fmt: skip
    check(out, expected, torch.float32)


def test_all_e4m3_codes():
    """Every finite code as a weight, times one."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    b = torch.zeros(1, len(codes), 128, dtype=torch.float8_e4m3fn)
    b[0, :, 7] = codes
    a = torch.zeros(1, 128)
    a[0, 7] = 1.0
    out = ops.grouped_gemm.triton(
        a.to(torch.float8_e4m3fn), b, torch.tensor([0, 1], dtype=torch.int32), a_scale=torch.ones(1, 1),
        b_scale=torch.ones(1, 2, 1), format="fp8_block", out_dtype=torch.float32,
    )  # fmt: skip
    assert torch.equal(out[0], codes.float())


def moe_by_loop(hidden_states, w13, w2, topk_weights, topk_ids, expert_map, weight_on_input):
    out = torch.zeros_like(hidden_states, dtype=torch.float32)
    for token, k in (topk_ids >= 0).nonzero().tolist():
        expert = int(expert_map[topk_ids[token, k]])
        if expert >= 0:
            weight = topk_weights[token, k]
            x = hidden_states[token].float() * (weight if weight_on_input else 1.0)
            gate, up = (w13[expert] @ x).chunk(2)
            down = w2[expert] @ (torch.nn.functional.silu(gate) * up)
            out[token] += down * (1.0 if weight_on_input else weight)
    return 2.5 * out


# Of the largest output. The unit roundoff of each format, times 4: about eight roundings of random sign (input, both
# weights, gate and up, act, both GEMMs' outputs) add up to sqrt(8) of them.
TOLERANCE = {"bf16": 4 * 2**-8, "fp16": 4 * 2**-11, "fp8_block": 4 * 2**-4, "int8": 4 * 2**-7}


@pytest.mark.parametrize("format", TOLERANCE)
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_fused_moe(format, weight_on_input):
    fmt, generator = FORMATS[format], torch.Generator().manual_seed(7)
    num_tokens, hidden, intermediate, num_experts, top_k = 9, 72, 48, 4, 1 if weight_on_input else 2
    dtype = torch.float16 if format == "fp16" else torch.bfloat16
    hidden_states = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    w13 = torch.randn(num_experts, 2 * intermediate, hidden, generator=generator) / hidden**0.5
    w2 = torch.randn(num_experts, hidden, intermediate, generator=generator) / intermediate**0.5
    topk_ids = torch.rand(num_tokens, 6, generator=generator).argsort(-1)[:, :top_k].int()
    topk_ids[3] = -1
    topk_weights = torch.rand(num_tokens, top_k, generator=generator)
    expert_map = torch.tensor([2, -1, 0, 3, 1, -1], dtype=torch.int32)
    w13_values, w13_scale = fmt.quantize(w13, fmt.weight_block, None, 2)
    w2_values, w2_scale = fmt.quantize(w2, fmt.weight_block)
    out = ops.fused_moe.triton(
        hidden_states, w13_values, w2_values, topk_weights, topk_ids,
        w13_scale=w13_scale if fmt.has_scale else None, w2_scale=w2_scale if fmt.has_scale else None,
        expert_map=expert_map, format=format, routed_scaling_factor=2.5, apply_router_weight_on_input=weight_on_input,
    )  # fmt: skip
    expected = moe_by_loop(hidden_states, w13, w2, topk_weights, topk_ids, expert_map, weight_on_input)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() <= TOLERANCE[format] * expected.abs().max()
    assert not out[3].any()
