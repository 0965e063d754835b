"""quantize, permute and act_mul against torch_moe_ops.formats, bit for bit; and what they do around the numbers."""

import pytest
import torch

import torch_moe_ops  # noqa: F401  (registers torch.ops.moe)
from torch_moe_ops.activations import ACTIVATIONS, split_gate_up
from torch_moe_ops.formats import FORMATS

ops = torch.ops.moe
OPTIONS = {"silu": {"alpha": 1.702, "beta": 1.0, "limit": 7.0}, "swiglustep": {"limit": 2.0}}


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal shape, dtype and bytes, except that any NaN equals any NaN."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    is_nan = got.float().isnan()
    assert torch.equal(is_nan, expected.float().isnan())
    differs = got.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)
    assert not (differs.view(*got.shape, got.element_size()).any(-1) & ~is_nan).any()


def awkward(rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Magnitudes over the whole range of dtype, and rows with NaN, infinities, zeros, denormals and exact ties."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-20, 12, (rows, k), generator=generator).float()
    x = (torch.randn(rows, k, generator=generator) * exponent.exp2()).to(dtype)
    x[0, 3] = float("nan")
    x[1, 5], x[1, k - 1] = float("inf"), -float("inf")
    x[2] = 0.0
    x[3] = x[3].float() * (1e-38 if dtype != torch.float16 else 1e-5)
    x[4] = torch.arange(k) * 0.25 - 4.0
    return x


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_is_bit_exact(format, dtype):
    fmt = FORMATS[format]
    if not fmt.has_scale:
        dtype = fmt.dtype
    x = awkward(6, 200, dtype)  # 200 is ragged for blocks of 16, 32 and 128
    for global_scale in [None, torch.tensor([0.37])] if fmt.has_global_scale else [None]:
        values, scale = ops.quantize.triton(x, format, global_scale=global_scale)
        expected_values, expected_scale = fmt.quantize(x, fmt.act_block, global_scale)
        assert_same_bits(values, expected_values)
        assert_same_bits(scale, expected_scale)


def test_quantize_rounds_ties_to_even_everywhere():
    """Every e4m3 code, and every midpoint between two, in blocks whose scale is exactly 1."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, -codes])
    x = torch.nn.functional.pad(points, (0, -len(points) % 127)).view(-1, 127)
    x = torch.cat([x, torch.full((len(x), 1), 448.0)], dim=1)
    values, scale = ops.quantize.triton(x, "fp8_block")
    assert torch.equal(scale, torch.ones_like(scale))
    assert_same_bits(values, x.to(torch.float8_e4m3fn))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("weighted", [False, True])
def test_permute_is_bit_exact(format, weighted):
    fmt = FORMATS[format]
    hidden_states = awkward(5, 144, torch.float16 if format == "fp16" else torch.bfloat16)
    slot_to_row = torch.tensor([[6, 0], [-1, 3], [2, -2], [5, 1], [-1, -1]], dtype=torch.int32)
    topk_weights = torch.linspace(0.1, 1.7, 10).view(5, 2) if weighted else None
    per_expert = {}
    if fmt.has_global_scale:
        offsets = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
        per_expert = {"global_scale": torch.tensor([0.3, 9.0, 1.7]), "expert_offsets": offsets}
    permuted, scale = ops.permute.triton(
        hidden_states, slot_to_row, 8, format=format, topk_weights=topk_weights, **per_expert
    )
    if format == "fp8_block":
        assert scale.stride() == (1, 8)
    for token, slot in (slot_to_row >= 0).nonzero().tolist():
        row = int(slot_to_row[token, slot])
        x = hidden_states[token : token + 1]
        if weighted:
            x = x.float() * topk_weights[token, slot]
        global_scale = torch.tensor([0.3 if row < 2 else 1.7]) if per_expert else None
        expected_values, expected_scale = fmt.quantize(x, fmt.act_block, global_scale)
        assert_same_bits(permuted[row : row + 1], expected_values)
        assert_same_bits(scale[row : row + 1], expected_scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "interleaved"])
def test_act_mul_activations(activation, layout):
    record, options = ACTIVATIONS[activation], OPTIONS.get(activation, {})
    if not record.gated and layout != "gate_up":
        return  # refused
    gate_up = torch.randn(5, 2 * 72, generator=torch.Generator().manual_seed(1)) * 3
    gate_up[4] = float("nan")  # past expert_offsets[-1]
    expert_offsets = torch.tensor([0, 1, 1, 4], dtype=torch.int32)
    act, scale = ops.act_mul.triton(gate_up, expert_offsets, activation=activation, layout=layout, **options)
    if record.gated:
        gate, up = split_gate_up(gate_up, layout)
        arguments = {"alpha": 1.0, "beta": 0.0, "limit": None} | options
        expected = record.apply(gate, up, arguments["alpha"], arguments["beta"], arguments["limit"])
    else:
        expected = record.apply(gate_up)
    assert scale.shape == (5, 0)
    # One bfloat16 rounding, and a few float32 roundings of terms up to |gate| * |up|.
    torch.testing.assert_close(act[:4].float(), expected[:4], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_act_mul_quantises_bit_exactly(format):
    """relu is exact up to its one product, so what follows must be the quantiser's bits."""
    fmt = FORMATS[format]
    gate_up = awkward(7, 2 * 176, torch.float32)
    expert_offsets = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    global_scale = torch.tensor([0.3, 9.0, 1.7]) if fmt.has_global_scale else None
    act, scale = ops.act_mul.triton(
        gate_up, expert_offsets, activation="relu", format=format, global_scale=global_scale
    )
    y = gate_up[:, :176].relu() * gate_up[:, 176:]
    for row in range(6):
        row_scale = None if global_scale is None else global_scale[0 if row < 3 else 2].view(1)
        expected_values, expected_scale = fmt.quantize(y[row : row + 1], fmt.act_block, row_scale)
        assert_same_bits(act[row : row + 1], expected_values)
        assert_same_bits(scale[row : row + 1], expected_scale)


def test_zero_rows():
    empty = torch.empty(0, 64, dtype=torch.bfloat16)
    assert ops.quantize.triton(empty, "fp8_block")[0].shape == (0, 64)
    permuted, scale = ops.permute.triton(empty, torch.empty(0, 2, dtype=torch.int32), 0, format="fp8_block")
    assert (permuted.shape, scale.shape) == ((0, 64), (0, 1))
    assert ops.act_mul.triton(empty, torch.zeros(3, dtype=torch.int32))[0].shape == (0, 32)


def test_int8_scales_of_rows_without_columns():
    x, offsets = torch.empty(4, 0, dtype=torch.bfloat16), torch.tensor([0, 4]).int()
    rows = torch.arange(4).int().view(4, 1)
    for op, args in ((ops.quantize, (x,)), (ops.permute, (x, rows, 4)), (ops.act_mul, (x, offsets))):
        assert_same_bits(op.triton(*args, format="int8")[1], op.reference(*args, format="int8")[1])


def test_a_scale_of_minus_zero_is_zero() -> None:
    x, global_scale = torch.randn(2, 32), torch.tensor(-1e38)
    got, expected = (op(x, "nvfp4", global_scale=global_scale) for op in (ops.quantize.triton, ops.quantize.reference))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1].view(torch.uint8), expected[1].view(torch.uint8))
