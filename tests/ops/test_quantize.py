"""quantize, the op: shapes, layouts and the formats' own quantiser (which test_formats.py takes apart bit by bit)."""

from __future__ import annotations

import pytest
import torch

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS, decode_scale

SCALE_COLUMNS = {
    "bf16": 0,
    "fp16": 0,
    "int8": 1,
    "fp8_block": 2,
    "fp8_block_e8m0": 2,
    "mxfp8": 7,
    "mxfp4": 7,
    "nvfp4": 13,
}
# The largest relative error of a value at least as large as half of its block's maximum: half a step of the value
# type, and for int8 half a step of the block. The scale of mxfp4 and mxfp8 may be up to twice as large as needed.
WORST_ERROR = {
    "bf16": 2**-8, "fp16": 2**-11, "int8": 1 / 127, "fp8_block": 2**-4, "fp8_block_e8m0": 2**-4, "mxfp8": 2**-4,
    "mxfp4": 0.34, "nvfp4": 0.34,
}  # fmt: skip


def test_round_trip(format: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 200) * torch.logspace(-1, 3, 6)[:, None]
    fmt = FORMATS[format]
    values, scale = moe.quantize(x, format)
    assert values.shape == (6, 200 // fmt.pack) and values.dtype == fmt.dtype and values.is_contiguous()
    assert scale.shape == (6, SCALE_COLUMNS[format]) and scale.dtype == fmt.scale_dtype and scale.is_contiguous()
    back = fmt.dequantize(values, scale, fmt.act_block)
    block_k = (fmt.act_block or (1, 1))[1] or 200
    blocks = torch.nn.functional.pad(x, (0, -200 % block_k)).unflatten(1, (-1, block_k))
    large = (blocks.abs() >= 0.5 * blocks.abs().amax(-1, keepdim=True)).flatten(1)[:, :200] & (x.abs() > 1e-3)
    assert ((back - x).abs() / x.abs())[large].max() <= WORST_ERROR[format]


def test_global_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64) * 1e-4  # too small for e4m3 scales alone
    fmt = FORMATS["nvfp4"]
    for global_scale in (torch.tensor([1e-5]), torch.tensor(1e-5)):
        values, scale = moe.quantize(x, "nvfp4", global_scale=global_scale)
        back = fmt.dequantize(values, scale, fmt.act_block, global_scale)
        assert ((back - x).norm() / x.norm()) < 0.15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_depends_on_itself_alone(format: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 96).to(dtype)
    values, scale = moe.quantize(x, format)
    for row in range(9):
        one_values, one_scale = moe.quantize(x[row : row + 1], format)
        assert torch.equal(one_values.view(torch.uint8), values[row : row + 1].view(torch.uint8))
        assert torch.equal(one_scale.float(), scale[row : row + 1].float())


def test_no_rows(format: str) -> None:
    values, scale = moe.quantize(torch.empty(0, 64), format)
    assert len(values) == len(scale) == 0


def test_the_input_is_copied() -> None:
    x = torch.randn(2, 4).bfloat16()
    values, _ = moe.quantize(x, "bf16")
    assert torch.equal(values, x) and values.data_ptr() != x.data_ptr()


def test_s3_5_scale_modes() -> None:
    """FP8 with 128-blocks: float32 scales, float32 powers of two, and those as packed MN-major words."""
    torch.manual_seed(0)
    x = torch.randn(130, 640).bfloat16() * torch.logspace(-3, 3, 130)[:, None]
    _, scale = moe.quantize(x, "fp8_block")
    values, exponents = moe.quantize(x, "fp8_block_e8m0")
    rounded = decode_scale(exponents)
    assert torch.equal(rounded, torch.exp2(torch.log2(scale.double()).ceil()).float())  # up, to a power of two
    assert torch.equal(moe.quantize(x / rounded.repeat_interleave(128, 1), "fp8_block_e8m0")[0].float(), values.float())
    words = moe.pack_scale(exponents, "words_mn")
    assert words.dtype == torch.int32 and words.shape == (130, 2) and words.stride() == (1, 132)
    assert torch.equal(words[:, 1] & 0xFF, exponents.view(torch.uint8)[:, 4].int())  # the fifth scale of each row
    # A GEMM for float32 scales takes the rounded ones as they are.
    offsets = torch.tensor([0, 130]).int()
    b, b_scale = FORMATS["fp8_block"].quantize(torch.randn(1, 64, 640), (128, 128))
    options = {"b_scale": b_scale, "format": "fp8_block", "out_dtype": torch.float32}
    out = moe.grouped_gemm(values, b, offsets, a_scale=rounded, **options)
    exact = FORMATS["fp8_block_e8m0"].dequantize(values, exponents, (1, 128)).double()
    exact = exact @ FORMATS["fp8_block"].dequantize(b, b_scale, (128, 128))[0].double().T
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_s3_5_scale_modes_of_act_mul() -> None:
    gate_up = torch.randn(6, 2 * 256).bfloat16()
    offsets = torch.tensor([0, 6]).int()
    _, scale = moe.act_mul(gate_up, offsets, format="fp8_block")
    _, exponents = moe.act_mul(gate_up, offsets, format="fp8_block_e8m0")
    assert scale.stride() == (1, 8) and exponents.is_contiguous()
    assert torch.equal(decode_scale(exponents), torch.exp2(torch.log2(scale.double()).ceil()).float())
