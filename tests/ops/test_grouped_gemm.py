"""grouped_gemm against float64 products of dequantised operands, and the exact order of the fp8_block sum."""

from __future__ import annotations

import pytest
import torch
from moe_cases import Call
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS, quantize_weight

COUNTS = [5, 0, 17, 1]  # rows of each expert
N, K = 48, 288


def make(
    format: str, act_format: str = "", alignment: int = 1, b_parts: int = 2, n: int = N, k: int = K, **options: object
) -> Call:
    """Rows padded to `alignment`, padding and tail poisoned with NaN; weights differ by part in magnitude."""
    torch.manual_seed(0)
    padded = [-(-count // alignment) * alignment for count in COUNTS]
    offsets = torch.tensor([0, *padded]).cumsum(0).int()
    x = torch.full((int(offsets[-1]) + 3, k), float("nan"))
    for first, count in zip(offsets.tolist(), COUNTS, strict=False):
        x[first : first + count] = torch.randn(count, k)
    w = torch.randn(len(COUNTS), n, k) * k**-0.5
    w[:, n // 2 :] *= 20.0
    acts = FORMATS[act_format or format]
    values, scale = acts.quantize(x, acts.act_block)
    b, b_scale, b_global_scale = quantize_weight(w, format, parts=b_parts)
    options |= {"a_scale": scale, "b_scale": b_scale, "b_global_scale": b_global_scale, "b_parts": b_parts}
    return Call(values, b, offsets, format=format, act_format=act_format, **options)


def expected(call: Call) -> tuple[Tensor, Tensor]:
    """(out, the sum of |products|) in float64 for every row in use; unused rows are NaN."""
    (values, b, offsets), o = call.args, call.options
    acts, weights = FORMATS[o["act_format"] or o["format"]], FORMATS[o["format"]]
    x = acts.dequantize(values, o["a_scale"], acts.act_block, o.get("a_global_scale")).double()
    w = weights.dequantize(b, o["b_scale"], weights.weight_block, o["b_global_scale"], o["b_parts"]).double()
    out = torch.full((len(x), b.shape[1]), float("nan"), dtype=torch.float64)
    size = out.clone()
    for e, (first, count) in enumerate(zip(offsets.tolist(), COUNTS, strict=False)):
        for row in range(first, first + count):
            products = x[row] * w[e]
            out[row], size[row] = products.sum(1), products.abs().sum(1)
            if o.get("bias") is not None:
                out[row] += o["bias"][e].double()
    return out, size


def compare(call: Call) -> None:
    got = call(moe.grouped_gemm)
    out, size = expected(call)
    used = ~out[:, 0].isnan()
    assert used.sum() == sum(COUNTS)
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


def test_mxfp8_activations_with_mxfp4_weights() -> None:
    compare(make("mxfp4", "mxfp8", out_dtype=torch.float32))


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
