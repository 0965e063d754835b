"""grouped_gemm against float64 products of dequantised operands, and the exact order of the fp8_block sum."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import Call
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS, quantize_weight

COUNTS = [5, 0, 17, 1]  # rows of each expert
N, K = 48, 288


def make(
    format: str,
    act_format: str = "",
    alignment: int = 1,
    b_parts: int = 2,
    n: int = N,
    k: int = K,
    counts: list[int] = COUNTS,
    **options: object,
) -> Call:
    """Rows padded to `alignment`; padding and tail are NaN, and so are their scales."""
    torch.manual_seed(0)
    padded = [-(-count // alignment) * alignment for count in counts]
    offsets = torch.tensor([0, *padded]).cumsum(0).int()
    x = torch.full((int(offsets[-1]) + 3, k), float("nan"))
    for first, count in zip(offsets.tolist(), counts, strict=False):
        x[first : first + count] = torch.randn(count, k)
    return call_of(x, offsets, format, act_format, b_parts, n, **options)


def make_masked(format: str, counts: list[int], max_m: int, act_format: str = "", n: int = N, k: int = K) -> Call:
    """x [E, max_m, K], of which expert e uses counts[e] rows; the others are NaN, and so are their scales."""
    torch.manual_seed(0)
    x, masked_m = torch.randn(len(counts), max_m, k), torch.tensor(counts).int()
    x[torch.arange(max_m) >= masked_m[:, None]] = float("nan")
    offsets = max_m * torch.arange(len(counts) + 1).int()
    return call_of(x.flatten(0, 1), offsets, format, act_format, 2, n, expert_rows=masked_m, out_dtype=torch.float32)


def call_of(x: Tensor, offsets: Tensor, format: str, act_format: str, b_parts: int, n: int, **options: object) -> Call:
    """Random weights, which differ by part in magnitude."""
    num_experts, k = len(offsets) - 1, x.shape[1]
    w = torch.randn(num_experts, n, k) * k**-0.5
    w[:, n // 2 :] *= 20.0
    acts = FORMATS[act_format or format]
    values, scale = acts.quantize(x, acts.act_block)
    bits = scale.view(torch.uint8) if scale.element_size() == 1 else scale
    bits[x[:, 0].isnan()] = float("nan") if bits is scale else 0xFF  # of e4m3 and of e8m0 a NaN
    b, b_scale, b_global_scale = quantize_weight(w, format, parts=b_parts)
    options |= {"a_scale": scale, "b_scale": b_scale, "b_global_scale": b_global_scale, "b_parts": b_parts}
    return Call(values, b, offsets, format=format, act_format=act_format, **options)


def expected(call: Call, counts: list[int]) -> tuple[Tensor, Tensor]:
    """(out, the sum of |products|) in float64 for every row in use; unused rows are NaN."""
    (values, b, offsets), o = call.args, call.options
    acts, weights = FORMATS[o["act_format"] or o["format"]], FORMATS[o["format"]]
    x = acts.dequantize(values, o["a_scale"], acts.act_block, o.get("a_global_scale")).double()
    w = weights.dequantize(b, o["b_scale"], weights.weight_block, o["b_global_scale"], o["b_parts"]).double()
    out = torch.full((len(x), b.shape[1]), float("nan"), dtype=torch.float64)
    size = out.clone()
    for e, (first, count) in enumerate(zip(offsets.tolist(), counts, strict=False)):
        for row in range(first, first + count):
            products = x[row] * w[e]
            out[row], size[row] = products.sum(1), products.abs().sum(1)
            if o.get("bias") is not None:
                out[row] += o["bias"][e].double()
    return out, size


def compare(call: Call, counts: list[int] = COUNTS) -> None:
    got = call(moe.grouped_gemm)
    out, size = expected(call, counts)
    used = ~out[:, 0].isnan()
    assert used.sum() == sum(counts)
    # Float32 sums of K terms err by less than K * 2^-24 * sum |products| (here: K / 8, errors are random and mostly
    # cancel), scaling by another 4 roundings; the output dtype rounds once more.
    rounding = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    tolerance = size * (K / 8 + 4) * 2**-24 + out.abs() * rounding
    assert ((got.double() - out).abs() <= tolerance)[used].all()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_format(format: str, out_dtype: torch.dtype) -> None:
    compare(make(format, out_dtype=out_dtype))


@pytest.mark.parametrize("act_format", ["bf16", "fp16"])
@pytest.mark.parametrize("format", ["int8", "fp8_block", "mxfp8", "mxfp4", "nvfp4"])
def test_weight_only(format: str, act_format: str) -> None:
    compare(make(format, act_format, out_dtype=torch.float32))


@pytest.mark.parametrize("format, act_format", [("mxfp4", "mxfp8"), ("mxfp4", "fp8_block"), ("nvfp4", "fp8_block")])
def test_8_bit_activations_with_4_bit_weights(format: str, act_format: str) -> None:
    compare(make(format, act_format, out_dtype=torch.float32))


def test_padding_is_never_read(format: str) -> None:
    """Rows between and behind the experts are NaN; no NaN may reach a row in use."""
    compare(make(format, alignment=8, out_dtype=torch.float32))


@pytest.mark.parametrize("b_parts", [1, 2, 3])
def test_blocks_are_counted_within_each_part(format: str, b_parts: int) -> None:
    """A part of 136 rows ends in the middle of a (128, 128) block."""
    compare(make(format, b_parts=b_parts, n=136 * b_parts, k=160, out_dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias(dtype: torch.dtype) -> None:
    bias = torch.randn(len(COUNTS), N).to(dtype)
    for format in ("bf16", "fp8_block"):
        compare(make(format, bias=bias, out_dtype=torch.float32))


def test_bias_is_added_before_the_output_is_rounded() -> None:
    """257 + 0.75 is 258 in bf16; 257 rounded first is 256, and so is 256.75."""
    a, b = torch.ones(1, 257).bfloat16(), torch.ones(1, 8, 257).bfloat16()
    out = moe.grouped_gemm(a, b, torch.tensor([0, 1]).int(), bias=torch.full((1, 8), 0.75), out_dtype=torch.bfloat16)
    assert out.tolist() == [[258.0] * 8]


def test_scales_in_any_strides(format: str) -> None:
    call = make(format)
    scales = {
        name: call.options[name].view(torch.uint8 if call.options[name].element_size() == 1 else torch.float32)
        for name in ("a_scale", "b_scale")
        if call.options[name] is not None
    }
    mn_major = {name: s.mT.contiguous().mT.view(call.options[name].dtype) for name, s in scales.items()}
    got = call(moe.grouped_gemm, **mn_major)
    assert torch.equal(got.nan_to_num(), call(moe.grouped_gemm).nan_to_num())


def test_bits_under_another_name() -> None:
    """4-bit weights as float4_e2m1fn_x2 and e8m0 scales as uint8 are the same numbers."""
    call = make("mxfp4")
    renamed = {name: call.options[name].view(torch.uint8) for name in ("a_scale", "b_scale")}
    other = Call(*(t.view(torch.float4_e2m1fn_x2) for t in call.args[:2]), call.args[2], **(call.options | renamed))
    assert torch.equal(other(moe.grouped_gemm).nan_to_num(), call(moe.grouped_gemm).nan_to_num())


def test_a_global_scale() -> None:
    call = make("nvfp4", out_dtype=torch.float32)
    base = call(moe.grouped_gemm)
    for scale in (torch.tensor([4.0]), torch.tensor(4.0), torch.full((4,), 4.0)):
        torch.testing.assert_close(
            call(moe.grouped_gemm, a_global_scale=scale), base * 4, rtol=0, atol=0, equal_nan=True
        )
    per_expert = call(moe.grouped_gemm, a_global_scale=torch.tensor([1.0, 1.0, 2.0, 1.0]))
    torch.testing.assert_close(per_expert[5:22], base[5:22] * 2)
    torch.testing.assert_close(per_expert[:5], base[:5])


def blocks_of_one(block_sums: list[float]) -> Call:
    """fp8_block with one row and column, whose 128-K blocks are 1 * 1 * a_scale: the blocks' sums are `block_sums`."""
    k = 128 * len(block_sums)
    a = torch.zeros(1, k)
    a[:, ::128] = 1.0
    return Call(
        a.to(torch.float8_e4m3fn),
        a.to(torch.float8_e4m3fn).unsqueeze(0),
        torch.tensor([0, 1]).int(),
        a_scale=torch.tensor([block_sums]),
        b_scale=torch.ones(1, 1, len(block_sums)),
        format="fp8_block",
        out_dtype=torch.float32,
    )


def test_fp8_blocks_are_added_in_k_order() -> None:
    """1 vanishes next to 1e8, so the order decides."""
    assert blocks_of_one([1e8, 1.0, -1e8])(moe.grouped_gemm).item() == 0.0
    assert blocks_of_one([1e8, -1e8, 1.0])(moe.grouped_gemm).item() == 1.0
    assert blocks_of_one([1.0, 1e8, -1e8])(moe.grouped_gemm).item() == 0.0


def test_fp8_scales_are_multiplied_first() -> None:
    """partial * (a_scale * b_scale): the product of the scales overflows although the result would not."""
    call = blocks_of_one([1e30])
    call.args = (*(t.float().mul(2**-9).to(t.dtype) for t in call.args[:2]), call.args[2])  # the partial sum is 2^-18
    assert call(moe.grouped_gemm, b_scale=torch.full((1, 1, 1), 1e12)).item() == float("inf")


def test_a_row_depends_on_itself_alone(format: str) -> None:
    """Batch invariance, bit for bit: every row alone gives what it gives among others."""
    call = make(format, out_dtype=torch.float32)
    together = call(moe.grouped_gemm)
    a, b, offsets = call.args
    for e, (first, count) in enumerate(zip(offsets.tolist(), COUNTS, strict=False)):
        for row in range(first, first + count, 4):
            alone = torch.zeros_like(offsets)
            alone[e + 1 :] = 1
            options = call.options | {"a_scale": call.options["a_scale"][row : row + 1]}
            assert torch.equal(Call(a[row : row + 1], b, alone, **options)(moe.grouped_gemm)[0], together[row])


def test_no_rows(format: str) -> None:
    call = make(format)
    options = call.options | {"a_scale": call.options["a_scale"][:0]}
    out = moe.grouped_gemm(call.args[0][:0], call.args[1], torch.zeros(5, dtype=torch.int32), **options)
    assert out.shape == (0, N)


# ---- expert_rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_m", [17, 40])
def test_s0_5_s0_6_the_masked_form(format: str, max_m: int) -> None:
    compare(make_masked(format, COUNTS, max_m), COUNTS)


@pytest.mark.parametrize("format, act_format", [("fp8_block", "bf16"), ("nvfp4", "fp16"), ("mxfp4", "mxfp8")])
def test_the_masked_form_of_mixed_formats(format: str, act_format: str) -> None:
    compare(make_masked(format, COUNTS, 20, act_format), COUNTS)


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS)),
    max_m=st.integers(0, 33),
    fill=st.lists(st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=5),
)
def test_masked_rows_have_the_bits_of_the_same_rows_without_gaps(format: str, max_m: int, fill: list[float]) -> None:
    """No expert, one, some or all of its rows; nothing of the rows between them reaches a result."""
    counts = [round(part * max_m) for part in fill]
    call = make_masked(format, counts, max_m, n=16, k=64)
    (a, b, _), masked_m, a_scale = call.args, call.options["expert_rows"], call.options["a_scale"]
    used = (torch.arange(max_m) < masked_m[:, None]).flatten()
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    compact = call.but(_take(a, used), b, offsets, a_scale=_take(a_scale, used), expert_rows=None)
    assert torch.equal(call(moe.grouped_gemm)[used], compact(moe.grouped_gemm))
    assert not compact(moe.grouped_gemm).isnan().any()


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    """tensor[rows], for dtypes that cannot be indexed so."""
    return tensor.view(torch.uint8)[rows].view(tensor.dtype) if tensor.element_size() == 1 else tensor[rows]


def test_expert_rows_end_ranges_of_any_size(format: str) -> None:
    """Ranges padded to 8 rows, of which the padding is cut off; then without a gap, where nothing is."""
    rows = {"expert_rows": torch.tensor(COUNTS).int(), "out_dtype": torch.float32}
    compare(make(format, alignment=8, **rows))
    call = make(format, **rows)
    assert torch.equal(call(moe.grouped_gemm), call(moe.grouped_gemm, expert_rows=None))


def test_rows_that_an_expert_does_not_have() -> None:
    call = make("bf16")
    lines = []
    for bad in ([5, 0, 18, 1], [5, 1, 17, 1], [-1, 0, 17, 1], [0, 0, 0, 2**31 - 1]):
        for op in (moe.grouped_gemm, torch.ops.moe.grouped_gemm.reference):
            with pytest.raises(RuntimeError) as caught:
                call(op, expert_rows=torch.tensor(bad).int())
            lines.append(str(caught.value))
    assert lines[::2] == lines[1::2]
    assert_expected_inline(
        "\n".join(lines[::2]),
        """\
grouped_gemm: expert_rows: expected values in [0, rows of the expert], got 18 for expert 2 of 17 rows
grouped_gemm: expert_rows: expected values in [0, rows of the expert], got 1 for expert 1 of 0 rows
grouped_gemm: expert_rows: expected values in [0, rows of the expert], got -1 for expert 0 of 5 rows
grouped_gemm: expert_rows: expected values in [0, rows of the expert], got 2147483647 for expert 3 of 1 rows""",
    )


def test_the_masked_layer_in_the_contract() -> None:
    """The example of docs/ops.md gives each row in use the bits that it gets as a token of fused_moe."""
    page = (Path(__file__).parents[2] / "docs/ops.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(example, names)
    used = torch.arange(names["max_m"]) < names["masked_m"][:, None]
    expert = used.nonzero()[:, :1].int()
    scales = {name: names[name] for name in ("w13_scale", "w2_scale")}
    weights = names["w13"], names["w2"], torch.ones(expert.shape)
    expected = moe.fused_moe(names["x"][used], *weights, expert, format="fp8_block", **scales)
    assert len(expected) == 26 and expected.isfinite().all()
    assert torch.equal(names["out"][used], expected)


@pytest.mark.parametrize("format, k", [("mxfp4", 35), ("nvfp4", 33)])
def test_activations_of_half_a_byte_of_weights_are_refused(format: str, k: int) -> None:
    b = torch.full((2, 8, k // 2), 0x22, dtype=torch.uint8)
    a, offsets = torch.ones(4, k, dtype=torch.bfloat16), torch.tensor([0, 2, 4], dtype=torch.int32)
    message = rf"^grouped_gemm: a: expected a multiple of 2 columns for {format}, got \[4, {k}\]$"
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=message):
            moe.grouped_gemm(a.to(device), b.to(device), offsets.to(device), format=format, act_format="bf16")
