"""pack_weight: what it keeps, how a kernel reads it, what ops make of it, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import Call, make_moe, opcheck
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS, unpack_e2m1
from torch_moe_ops.packed_weights import REGISTER_BITS, ROTATIONS, ROUNDED_ACTS

PACKABLE = ("nvfp4", "mxfp4", "mxfp8")
# What the kernel's products of value and scale are multiplied by, and the bytes of a block's values and of all of it.
UNPACKED_SCALE = {"nvfp4": 2.0**19, "mxfp4": 2.0**63, "mxfp8": 2.0**57}
BLOCK_BYTES = {"nvfp4": (2048, 2304), "mxfp4": (2048, 2176), "mxfp8": (4096, 4224)}
pytestmark = pytest.mark.parametrize("format", PACKABLE)


def random_weight(format: str, num_experts: int, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Every code and every scale that is a number."""
    g = torch.Generator().manual_seed(seed)
    fmt = FORMATS[format]
    values = torch.randint(0, 256, (num_experts, n, k // fmt.pack), generator=g, dtype=torch.uint8)
    if format == "mxfp8":
        values = torch.where(values & 0x7F == 0x7F, 0, values)
    shape = (num_experts, *fmt.weight_scale_shape(n, k))
    first, end = {"nvfp4": (0, 0x7F), "mxfp4": (0, 192), "mxfp8": (60, 192)}[format]  # mxfp8: none is subnormal
    scale = torch.randint(first, end, shape, generator=g, dtype=torch.uint8)
    return values.view(fmt.dtype), scale.view(fmt.scale_dtype)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def dequantize(format: str, values: Tensor, scale: Tensor) -> Tensor:
    return FORMATS[format].dequantize(values, scale, FORMATS[format].weight_block)


def bfloat16(bits: Tensor) -> Tensor:
    """16 bits in an int64 -> float64."""
    return bits.to(torch.int32).bitwise_left_shift(16).view(torch.float32).double()


def read_like_the_kernel(packed: Tensor, format: str) -> Tensor:
    """float64 [E, N, K]: the integer arithmetic of packed_mainloop_sm90.cuh, its products exact."""
    experts, row_blocks, k_blocks, _ = packed.shape

    def words(first: int, last: int, *shape: int) -> Tensor:
        data = packed[..., first:last].contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        return data.view(experts, row_blocks, k_blocks, *shape)

    def shifted(word: Tensor, count: int) -> Tensor:
        return (word << count if count >= 0 else word >> -count) & 0xFFFFFFFF

    first, end = BLOCK_BYTES[format]
    values = words(0, first, 2, 128, 2, first // 2048)
    out = torch.zeros(experts, row_blocks * 64, k_blocks * 64, dtype=torch.float64)
    for thread in range(128):
        row, c = 16 * (thread // 32) + thread % 32 // 4, thread % 4
        for step in range(4):
            word = values[:, :, :, step // 2, thread, step % 2]
            if format == "nvfp4":
                stored = words(first, end, 32, 2)[..., thread // 4, step // 2]
                both = (stored >> 8 * (step % 2) & 0x00FF00FF) * 16 + 0x70007000
            else:
                both = (words(first, end, 32)[..., thread // 4] >> 8 * (step // 2) & 0x00FF00FF) * 128
            for j in range(4):
                if format == "mxfp8":
                    register = shifted(word[..., j // 2], -4 if j % 2 == 0 else 4) & 0x07F007F0
                    register |= shifted(word[..., j // 2], 0 if j % 2 == 0 else 8) & 0x80008000
                else:
                    register = torch.zeros_like(word[..., 0])
                    for bit, by in zip(REGISTER_BITS, ROTATIONS[j], strict=True):
                        rotated = shifted(word[..., 0], by) | word[..., 0] >> (32 - by)
                        register |= rotated & (0x00010001 << bit)
                scale = bfloat16(both >> 16 * (j % 2) & 0xFFFF)
                for half in range(2):
                    value = bfloat16(register >> 16 * half & 0xFFFF)
                    out[:, row + 8 * (j % 2) :: 64, 16 * step + 8 * (j // 2) + 2 * c + half :: 64] = value * scale
    return out * UNPACKED_SCALE[format]


@settings(max_examples=20, deadline=None)
@given(experts=st.integers(1, 3), n=st.integers(1, 3), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_round_trip(format: str, experts: int, n: int, k: int, seed: int) -> None:
    values, scale = random_weight(format, experts, 64 * n, 64 * k, seed)
    packed = moe.pack_weight(values, scale, format)
    assert packed.numel() == values.numel() + scale.numel()  # not a byte more
    got_values, got_scale = moe.unpack_weight(packed, format)
    assert torch.equal(bits(got_scale), bits(scale))
    fmt = FORMATS[format]
    zero = (bits(scale) == 0).repeat_interleave(fmt.weight_block[1] // fmt.pack, -1)
    keeps = ~zero if format == "nvfp4" else torch.ones_like(zero)  # what a zero multiplies becomes zero
    assert got_values.dtype == fmt.dtype and torch.equal(bits(got_values)[keeps], bits(values)[keeps])
    assert torch.equal(dequantize(format, got_values, got_scale), dequantize(format, values, scale))


def test_a_kernel_reads_every_number_exactly(format: str) -> None:
    values, scale = random_weight(format, 1, 128, 128)
    expected = dequantize(format, values, scale).double()
    assert torch.equal(read_like_the_kernel(moe.pack_weight(values, scale, format), format), expected)


def test_scales_at_the_ends(format: str) -> None:
    """Negative and NaN scales of nvfp4 keep their meaning; e8m0 scales that bfloat16 has no room for are infinite."""
    fmt = FORMATS[format]
    values = torch.full((1, 64, 64 // fmt.pack), 0x2A if fmt.pack == 2 else 0x38, dtype=torch.uint8)  # -1, 1; 1
    scale = torch.full((1, 64, 64 // fmt.weight_block[1]), 0x40 if format == "nvfp4" else 127, dtype=torch.uint8)
    scale[0, 0, 0] = 0xC0 if format == "nvfp4" else 192
    scale[0, 1, 0] = 0x7F if format == "nvfp4" else 255
    packed = moe.pack_weight(values.view(fmt.dtype), scale.view(fmt.scale_dtype), format)
    read = read_like_the_kernel(packed, format)
    if format == "nvfp4":
        assert read[0, 0, :2].tolist() == [2.0, -2.0] and read[0, 1, :16].isnan().all()
        assert torch.equal(dequantize(format, *moe.unpack_weight(packed, format))[0, 0, :2], read[0, 0, :2].float())
    else:
        assert not read[0, :2, :32].isfinite().any()
    assert read[0, 2:].abs().unique().tolist() == [2.0 if format == "nvfp4" else 1.0]


def test_a_nan_is_not_lost(format: str) -> None:
    """mxfp8 values can be NaN. The kernel has no such value: their block of 32 is not finite, and no other."""
    if format != "mxfp8":
        pytest.skip("every 4-bit value is a number")
    values, scale = random_weight(format, 1, 64, 128)
    bits(values)[0, 9, 40] = 0xFF
    packed = moe.pack_weight(values, scale, format)
    finite = torch.ones(64, 128, dtype=torch.bool)
    finite[9, 32:64] = False
    assert torch.equal(read_like_the_kernel(packed, format)[0].isfinite(), finite)
    assert torch.equal(dequantize(format, *moe.unpack_weight(packed, format))[0].isfinite(), finite)


def test_grouped_gemm_and_fused_moe_take_either(format: str) -> None:
    call = make_moe(format, act_format="bf16", hidden_size=128, intermediate_size=192, bias=True)
    x, w13, w2, *routing = call.args
    packed = [moe.pack_weight(w, call.options[f"{name}_scale"], format) for name, w in (("w13", w13), ("w2", w2))]
    other = Call(x, *packed, *routing, **(call.options | {"w13_scale": None, "w2_scale": None}))
    assert torch.equal(other(moe.fused_moe), call(moe.fused_moe))
    opcheck(torch.ops.moe.fused_moe.default, other)
    offsets = torch.tensor([0, 5, 9, 9, 20, 33]).int()
    scales = {"b_scale": call.options["w13_scale"], "b_global_scale": call.options["w13_global_scale"]}
    options = {"format": format, "act_format": "bf16", "b_parts": 2}
    got = moe.grouped_gemm(x, packed[0], offsets, **(scales | {"b_scale": None}), **options)
    assert torch.equal(got, moe.grouped_gemm(x, w13, offsets, **scales, **options))
    mixed = Call(x, packed[0], w2, *routing, **(call.options | {"w13_scale": None}))
    assert ": w13: expected packed or not as w2 is, got [" in line(RuntimeError, mixed, moe.fused_moe)


def test_experts(format: str) -> None:
    weights = torch.randn(4, 2 * 64, 128).bfloat16(), torch.randn(4, 128, 64).bfloat16()
    experts = moe.Experts.from_weights(*weights, format=format, act_format="bf16")
    packed = experts.packed()
    assert (packed.hidden_size, packed.intermediate_size, packed.w13_scale) == (128, 64, None)
    assert repr(packed) == repr(experts) and torch.equal(packed.packed().w2, packed.w2)
    inputs = torch.randn(3, 128).bfloat16(), torch.rand(3, 2), torch.tensor([[0, 1], [-1, 3], [2, 1]]).int()
    assert torch.equal(packed(*inputs), experts(*inputs))
    other = moe.Experts.from_weights(*weights, format=format, act_format="bf16").packed()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(torch.compile(other, fullgraph=True, dynamic=True)(*inputs), experts(*inputs))


@pytest.mark.parametrize("act_format", ["bf16", "fp8_block", "fp8_block_e8m0", "mxfp8", "mxfp4", "nvfp4"])
def test_experts_are_packed_for_their_activations(format: str, act_format: str) -> None:
    """In the layout for those, if there is one, else in that for bf16 ones."""
    has_layout = (format, act_format) == ("mxfp4", "fp8_block")
    if not has_layout and act_format not in ("bf16", *ROUNDED_ACTS[format]):
        pytest.skip(f"{format} weights are not multiplied by {act_format} activations so")
    weights = torch.randn(4, 2 * 64, 128).bfloat16(), torch.randn(4, 128, 64).bfloat16()
    experts = moe.Experts.from_weights(*weights, format=format, act_format=act_format)
    packed = experts.packed()
    assert packed.w2.dtype == (torch.int32 if has_layout else torch.uint8)
    inputs = torch.randn(3, 128).bfloat16(), torch.rand(3, 2), torch.tensor([[0, 1], [-1, 3], [2, 1]]).int()
    assert torch.equal(packed(*inputs), experts(*inputs))


def line(error: type[Exception], function: object, *args: object, **options: object) -> str:
    with pytest.raises(error) as caught:
        function(*args, **options)
    return str(caught.value)


def test_refusals(format: str) -> None:
    values, scale = random_weight(format, 2, 128, 64)
    lines = [
        line(RuntimeError, moe.pack_weight, values[:, :100], scale[:, :100], format),
        line(RuntimeError, moe.pack_weight, values, scale[:, :64], format),
        line(RuntimeError, moe.pack_weight, values.float(), scale, format),
        line(RuntimeError, moe.pack_weight, values, scale, "fp8_block"),
        line(RuntimeError, moe.unpack_weight, values, format),
    ]
    packed, offsets, x = moe.pack_weight(values, scale, format), torch.tensor([0, 1, 2]).int(), torch.ones(2, 64)
    options = {"format": format, "act_format": "bf16"}
    gemm = moe.grouped_gemm
    lines += [
        line(RuntimeError, gemm, x.bfloat16(), packed, offsets, b_scale=scale, **options),
        line(RuntimeError, gemm, x.bfloat16(), packed[..., :1024].contiguous(), offsets, **options),
        line(RuntimeError, gemm, torch.ones(2, 128).bfloat16(), packed, offsets, **options),
        line(RuntimeError, gemm, x.bfloat16(), packed, offsets, format="fp8_block", act_format="bf16"),
    ]
    if format == "nvfp4":
        assert_expected_inline(
            "\n".join(lines),
            """\
pack_weight: values: expected N and K to be multiples of 64, got N 100, K 64
pack_weight: scale: expected float8_e4m3fn [2, 128, 4] on cpu, got float8_e4m3fn [2, 64, 4] on cpu
pack_weight: values: expected uint8 [E, N, K/2], got float32 [2, 128, 32] on cpu
pack_weight: format: expected one of nvfp4, mxfp4, mxfp8, got fp8_block
unpack_weight: packed: expected contiguous uint8 [E, N/64, K/64, 2304] of pack_weight, got uint8 [2, 128, 32] on cpu
grouped_gemm: b_scale: expected none beside packed b, which holds it, got [2, 128, 4]
grouped_gemm: b: expected contiguous uint8 [E, N/64, K/64, 2304] of pack_weight, got uint8 [2, 2, 1, 1024] on cpu
grouped_gemm: b: expected packed [2, 128, 128] on cpu, got packed [2, 128, 64] on cpu
grouped_gemm: b: expected float8_e4m3fn [E, N, K] on cpu, got uint8 [2, 2, 1, 2304] on cpu""",  # noqa: E501
        )
    assert all("\n" not in text and ": expected " in text and ", got " in text for text in lines)


def test_meta_and_cpu_agree(format: str) -> None:
    """A fake tensor gets the same packed shape and result shape."""
    values, scale = random_weight(format, 2, 128, 64)
    packed = moe.pack_weight(values, scale, format)
    with torch.device("meta"):
        a, offsets = torch.empty(5, 64, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int32)
    out = moe.grouped_gemm(a, packed.to("meta"), offsets, format=format, act_format="bf16")
    assert out.shape == (5, 128) and out.dtype == torch.bfloat16


def test_values_are_those_of_the_checkpoint(format: str) -> None:
    """Low nibble = even k, in the packed order as well."""
    fmt = FORMATS[format]
    values = torch.zeros(1, 64, 64 // fmt.pack, dtype=torch.uint8)
    values[0, 5, 6 // fmt.pack] = 0x07
    one = 0x38 if format == "nvfp4" else 127
    scale = torch.full((1, 64, 64 // fmt.weight_block[1]), one, dtype=torch.uint8).view(fmt.scale_dtype)
    got = moe.unpack_weight(moe.pack_weight(values.view(fmt.dtype), scale, format), format)[0]
    numbers = unpack_e2m1(got) if fmt.pack == 2 else got.float()
    assert numbers.nonzero().tolist() == [[0, 5, 6]]


def test_other_dtypes_of_a_byte_are_refused(format: str) -> None:
    """Once packed, nobody could tell."""
    values, scale = random_weight(format, 1, 64, 64)
    wrong_scale = torch.float8_e8m0fnu if format == "nvfp4" else torch.float8_e4m3fn
    for other in ((values.view(torch.float8_e5m2), scale), (values, scale.view(wrong_scale)), (values, None)):
        with pytest.raises(RuntimeError, match=r"^pack_weight: (values|scale): expected [^\n]*, got [^\n]*$"):
            moe.pack_weight(*other, format)


def test_the_default_device_does_not_matter(format: str) -> None:
    weight = random_weight(format, 1, 64, 128)
    packed = moe.pack_weight(*weight, format)
    with torch.device("meta"):
        assert torch.equal(bits(moe.pack_weight(*weight, format)), bits(packed))
        values, scale = moe.unpack_weight(packed, format)
    for got, expected in zip((values, scale), moe.unpack_weight(packed, format), strict=True):
        assert torch.equal(bits(got), bits(expected))
