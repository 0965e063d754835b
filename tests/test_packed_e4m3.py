"""mxfp4 weights packed for fp8_block activations: the layout, what a kernel makes of it, and what does not fit it."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import Call, make_moe, opcheck
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.cli import _layer
from torch_moe_ops.formats import FORMATS

MXFP4 = FORMATS["mxfp4"]
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def random_weight(num_experts: int, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Every code, exponents within 11 of the row's largest; one block in 8 and a few rows have zeros alone (and -0)."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (num_experts, n, k // 32, 32), generator=g)
    zeros = torch.rand(num_experts, n, k // 32, 1, generator=g) < 1 / 8
    zeros[:, ::19] = True
    codes = torch.where(zeros, codes & 8, codes).flatten(2)
    largest = torch.randint(11, 255, (num_experts, n, 1), generator=g)
    scale = largest - torch.randint(0, 12, (num_experts, n, k // 32), generator=g)
    scale = torch.where(zeros[..., 0], torch.randint(0, 256, scale.shape, generator=g), scale)
    values = codes[..., 0::2] | codes[..., 1::2] << 4
    return values.byte().view(MXFP4.dtype), scale.byte().view(MXFP4.scale_dtype)


def pack(values: Tensor, scale: Tensor, **options: str) -> Tensor:
    return moe.pack_weight(values, scale, "mxfp4", **({"act_format": "fp8_block"} | options))


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """float64 [E, N, K]; blocks of zeros have no scale."""
    ones = torch.ones_like(scale.view(torch.uint8)) * 127
    number = MXFP4.dequantize(values, ones.view(MXFP4.scale_dtype), MXFP4.weight_block).double()
    exponent = scale.view(torch.uint8).double().repeat_interleave(32, -1) - 127
    return torch.where(number == 0, number, number * exponent.exp2())


def e4m3(x: float) -> float:
    return torch.tensor(x).to(torch.float8_e4m3fn).item()


def read_thread(block: list[int], thread: int) -> dict[tuple[int, int], float]:
    """(row, k) -> weight, of what one thread multiplies of a block of 2176 bytes."""
    numbers = {}
    g, c = thread % 32 // 4, thread % 4
    for half in range(2):
        for second in range(2):
            at = 4 * (2 * (128 * half + thread) + second)
            word = int.from_bytes(bytes(block[at : at + 4]), "little")
            row = 16 * (thread // 32) + g + 8 * second
            scales = block[2048 + 4 * (thread // 4) + 2 * second :][:2]
            difference, largest = scales[half] % 16, scales[0] // 16 + scales[1] // 16 * 16
            for i in range(8):
                sign = word >> (8 * i + 7 if i < 4 else 8 * (i - 4) + 3) & 1
                number = (-1) ** sign * MAGNITUDES[word >> 4 * i & 7]
                k = 32 * half + 16 * (i // 4) + 4 * c + i % 4
                numbers[row, k] = e4m3(number * 2 ** (6 - difference)) * 2.0 ** (largest - 133)
    return numbers


def read_blocks(packed: Tensor) -> Tensor:
    """float64 [E, N, K]: all threads of all blocks, by the same rules in torch."""
    experts, row_blocks, k_blocks, _ = packed.shape
    magnitudes = torch.tensor(MAGNITUDES, dtype=torch.float64)
    words = packed[..., :512].long().view(experts, row_blocks, k_blocks, 2, 128, 2)
    scales = packed[..., 512:].contiguous().view(torch.uint8).view(experts, row_blocks, k_blocks, 32, 2, 2)
    differences = (scales % 16).double()
    largest = (scales[..., 0] // 16 + scales[..., 1] // 16 * 16).double()
    out = torch.full((experts, 64 * row_blocks, 64 * k_blocks), torch.nan, dtype=torch.float64)
    for thread in range(128):
        for half, second, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(8)).tolist():
            word = words[..., half, thread, second]
            sign = 1 - 2 * (word >> (8 * i + 7 if i < 4 else 8 * (i - 4) + 3) & 1)
            lowered = magnitudes[word >> 4 * i & 7] * (6 - differences[..., thread // 4, second, half]).exp2()
            assert (lowered == 0).logical_or(lowered >= 2**-6).all() and lowered.max() < 448  # normal e4m3 numbers
            number = sign * lowered.to(torch.float8_e4m3fn).double() * (largest[..., thread // 4, second] - 133).exp2()
            row, k = 16 * (thread // 32) + thread % 32 // 4 + 8 * second, 32 * half + 16 * (i // 4) + 4 * (thread % 4)
            out[:, row::64, k + i % 4 :: 64] = number
    return out


def test_the_words_of_a_thread() -> None:
    values, scale = random_weight(1, 64, 64)
    block = pack(values, scale)[0, 0, 0].view(torch.uint8).tolist()
    expected = dequantize(values, scale)[0]
    read = {}
    for thread in range(128):
        numbers = read_thread(block, thread)
        assert len(numbers) == 32 and not numbers.keys() & read.keys()
        read |= numbers
    assert read == {(row, k): expected[row, k].item() for row in range(64) for k in range(64)}


@settings(max_examples=20, deadline=None)
@given(experts=st.integers(1, 3), n=st.integers(1, 2), k=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_round_trip(experts: int, n: int, k: int, seed: int) -> None:
    values, scale = random_weight(experts, 64 * n, 64 * k, seed)
    packed = pack(values, scale)
    assert packed.shape == (experts, n, k, 544) and packed.dtype == torch.int32
    assert torch.equal(read_blocks(packed), dequantize(values, scale))
    got_values, got_scale = moe.unpack_weight(packed, "mxfp4")
    assert got_values.dtype == MXFP4.dtype and got_scale.dtype == MXFP4.scale_dtype
    assert torch.equal(got_values.view(torch.uint8), values.view(torch.uint8))  # -0 included
    zeros = (values.view(torch.uint8) & 0x77 == 0).unflatten(-1, (-1, 16)).all(-1)
    scale, got_scale = scale.view(torch.uint8), got_scale.view(torch.uint8)
    assert torch.equal(got_scale[~zeros], scale[~zeros])
    largest = torch.where(zeros, 0, scale).amax(-1, keepdim=True)
    largest = torch.where(zeros.all(-1, keepdim=True), 127, largest)
    assert torch.equal(got_scale, torch.where(zeros, largest, scale))
    assert torch.equal(pack(got_values, got_scale.view(MXFP4.scale_dtype)), packed)


def test_chunks_and_layouts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    values, scale = random_weight(3, 64, 128)
    packed = pack(values, scale)
    monkeypatch.setattr("torch_moe_ops.packed_weights.CHUNK_ELEMENTS", 64 * 128)
    assert torch.equal(pack(values, scale), packed)
    for_bf16 = moe.pack_weight(values, scale, "mxfp4", act_format="bf16")
    assert for_bf16.shape[-1] == 2176 and torch.equal(for_bf16, moe.pack_weight(values, scale, "mxfp4"))
    assert torch.equal(*(moe.unpack_weight(each, "mxfp4")[0].view(torch.uint8) for each in (packed, for_bf16)))


def refusal(function: object, *args: object, **options: object) -> str:
    with pytest.raises(RuntimeError) as caught:
        function(*args, **options)
    return str(caught.value)


def test_scales_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_moe_ops.packed_weights.CHUNK_ELEMENTS", 64 * 128)  # an expert a chunk
    values = torch.full((3, 64, 64), 0x2A, dtype=torch.uint8)
    scale = torch.full((3, 64, 4), 120, dtype=torch.uint8)
    scale[2, 7, 1] = 131
    pack(values, scale)
    scale[2, 7, 3] = 119
    lines = [refusal(pack, values, scale)]
    scale[1, 9] = 255
    lines.append(refusal(pack, values, scale))
    assert_expected_inline(
        "\n".join(lines),
        """\
pack_weight: scale: expected exponents within 11 of the largest in each row (e4m3 holds no more), got 12 less in row 7 of expert 2
pack_weight: scale: expected exponents within 11 of the largest in each row (e4m3 holds no more), got NaN in row 9 of expert 1""",  # noqa: E501
    )
    values[1, 9], values[2, 7, 48:] = 0x88, 0  # of zeros nobody reads the scale
    assert read_blocks(pack(values, scale)).isfinite().all()


def test_refusals() -> None:
    values, scale = random_weight(2, 128, 64)
    nvfp4_scale = torch.full((2, 128, 4), 0x38, dtype=torch.uint8)
    packed, for_bf16 = pack(values, scale), moe.pack_weight(values, scale, "mxfp4")
    offsets = torch.tensor([0, 1, 2]).int()
    quantised, a_scale = moe.quantize(torch.ones(2, 64, dtype=torch.bfloat16), "fp8_block")
    x, gemm = torch.ones(2, 64, dtype=torch.bfloat16), moe.grouped_gemm
    call = make_moe("mxfp4", act_format="fp8_block", hidden_size=64, intermediate_size=64)
    weights = [pack(call.args[1], call.options["w13_scale"]), for_bf16[:1].expand(5, -1, -1, -1)[:, :1].contiguous()]
    mixed = Call(call.args[0], *weights, *call.args[3:], **(call.options | {"w13_scale": None, "w2_scale": None}))
    lines = [
        refusal(moe.pack_weight, values, nvfp4_scale, "nvfp4", act_format="fp8_block"),
        refusal(pack, values, scale, act_format="mxfp8"),
        refusal(pack, values, scale, act_format="fp8"),
        refusal(moe.unpack_weight, packed[..., :512], "mxfp4"),
        refusal(gemm, quantised, for_bf16, offsets, a_scale=a_scale, format="mxfp4", act_format="fp8_block"),
        refusal(gemm, x, packed, offsets, format="mxfp4", act_format="bf16"),
        refusal(mixed, moe.fused_moe),
        refusal(moe.Experts, weights[0], weights[0][:, :1].contiguous(), format="mxfp4", act_format="bf16"),
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
pack_weight: act_format: expected bf16 for nvfp4 weights, got fp8_block
pack_weight: act_format: expected bf16 or fp8_block for mxfp4 weights, got mxfp8
pack_weight: act_format: expected bf16 or fp8_block for mxfp4 weights, got fp8
unpack_weight: packed: expected contiguous uint8 [E, N/64, K/64, 2176] or int32 [E, N/64, K/64, 544] of pack_weight, got int32 [2, 2, 1, 512] on cpu
grouped_gemm: b: expected contiguous int32 [E, N/64, K/64, 544] of pack_weight(..., act_format="fp8_block"), got uint8 [2, 2, 1, 2176] on cpu
grouped_gemm: b: expected contiguous uint8 [E, N/64, K/64, 2176] of pack_weight(..., act_format="bf16"), got int32 [2, 2, 1, 544] on cpu
fused_moe: w2: expected contiguous int32 [E, N/64, K/64, 544] of pack_weight(..., act_format="fp8_block"), got uint8 [5, 1, 1, 2176] on cpu
Experts: w13: expected contiguous uint8 [E, N/64, K/64, 2176] of pack_weight(..., act_format="bf16"), got int32 [5, 2, 1, 544] on cpu""",  # noqa: E501
    )


def test_grouped_gemm_and_fused_moe_take_either() -> None:
    call = make_moe("mxfp4", act_format="fp8_block", hidden_size=128, intermediate_size=192, bias=True)
    x, w13, w2, *routing = call.args
    packed = [pack(w, call.options[f"{name}_scale"]) for name, w in (("w13", w13), ("w2", w2))]
    other = Call(x, *packed, *routing, **(call.options | {"w13_scale": None, "w2_scale": None}))
    assert torch.equal(other(moe.fused_moe), call(moe.fused_moe))
    opcheck(torch.ops.moe.fused_moe.default, other)
    a, a_scale = moe.quantize(x, "fp8_block")
    options = {"a_scale": a_scale, "format": "mxfp4", "act_format": "fp8_block", "b_parts": 2}
    offsets = torch.tensor([0, 5, 9, 9, 20, 33]).int()
    expected = moe.grouped_gemm(a, w13, offsets, b_scale=call.options["w13_scale"], **options)
    assert torch.equal(moe.grouped_gemm(a, packed[0], offsets, **options), expected)
    fake = Call(a, packed[0], offsets, **options).to("meta")(moe.grouped_gemm)
    assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)


def test_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `bench --formats mxfp4 --act-format fp8_block` makes them for a GPU that takes them packed."""
    experts = _layer.make_experts(_layer.TINY, "mxfp4", "fp8_block", "cpu")
    monkeypatch.setattr(_layer, "needs_packing", lambda experts: True)
    packed = _layer.make_experts(_layer.TINY, "mxfp4", "fp8_block", "cpu")
    assert packed.w13.shape == (4, 6, 4, 544) and packed.w13_scale is packed.w2_scale is None
    assert repr(packed) == repr(experts) and torch.equal(packed.packed().w2, packed.w2)
    inputs = _layer.make_inputs(_layer.TINY, 9, torch.Generator().manual_seed(2))
    output = packed(*inputs)
    assert torch.equal(output, experts(*inputs))
    rows, expected = _layer.reference(packed, inputs)
    assert _layer.relative_error(output[rows], expected) <= _layer.tolerance(packed)
    weights = torch.randn(4, 384, 256), torch.randn(4, 256, 192)
    other = moe.Experts.from_weights(*weights, format="mxfp4", act_format="fp8_block").packed()
    assert other.load_state_dict(packed.state_dict(), strict=False).unexpected_keys == ["expert_map"]  # changes no id
    assert torch.equal(torch.compile(other, fullgraph=True, dynamic=True)(*inputs), output)


def test_workspace_is_that_of_the_activations() -> None:
    sizes = (13, 160, 96, 5, 2)
    assert moe.workspace_bytes(*sizes, "mxfp4", "fp8_block") == moe.workspace_bytes(*sizes, "fp8_block")
