"""grouped_gemm of mxfp4 weights, packed for them, and fp8_block activations on SM90. (fused_moe: test_fused_moe.py.)"""

from __future__ import annotations

import pytest
import torch
from gpu_layers import DEVICE, W4A8, formats_of, poison_free_memory
from moe_cases import Call

import torch_moe_ops as moe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

E8M0_ONE = 127


def grouped_gemm(rows: list[int], n: int, k: int, token_values: int, exponents: int, seed: int = 4) -> tuple[Call, int]:
    """Tokens are integers below token_values in size, exponents of weights differ by less than `exponents`."""
    verdicts = moe.explain("grouped_gemm", device=DEVICE, packed=True, **formats_of(W4A8)).verdicts
    if reason := next(v.reason for v in verdicts if v.backend == "cutlass_sm90"):
        pytest.skip(reason)
    g = torch.Generator(DEVICE).manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g, device=DEVICE)

    values = integers(0, 256, len(rows), n, k // 2).to(torch.uint8)
    scale = (E8M0_ONE + 1 - integers(0, exponents, len(rows), n, k // 32)).to(torch.uint8).view(torch.float8_e8m0fnu)
    used = sum(rows)
    a = integers(1 - token_values, token_values, used + 5, k).to(torch.float8_e4m3fn)
    a_scale = 2.0 ** integers(-2, 3, used + 5, -(-k // 128))
    a[used:] = float("nan")
    call = Call(
        a,
        moe.pack_weight(values, scale, "mxfp4", act_format="fp8_block"),
        torch.tensor([0, *rows], device=DEVICE).cumsum(0).int(),
        a_scale=a_scale,
        bias=integers(-8, 9, len(rows), n).bfloat16(),
        b_parts=2,
        out_dtype=torch.float32,
        **formats_of(W4A8),
    )
    return call, used


def got_and_expected(rows: list[int], sizes: tuple[int, int], **random: int) -> tuple[torch.Tensor, torch.Tensor]:
    call, used = grouped_gemm(rows, *sizes, **random)
    poison_free_memory()
    got, expected = call(torch.ops.moe.grouped_gemm.cutlass_sm90), call(torch.ops.moe.grouped_gemm.reference)
    return got[:used], expected[:used]


@pytest.fixture(params=([1, 0, 3, 130], [0, 8, 70, 17], [300, 300, 300, 300]), ids=str)
def rows(request: pytest.FixtureRequest) -> list[int]:
    return request.param


@pytest.fixture(params=((2 * 64, 64), (2 * 704, 2880), (2 * 1024, 512)), ids=str)
def sizes(request: pytest.FixtureRequest) -> tuple[int, int]:
    """N, K"""
    return request.param


def test_exact_where_sums_are(rows: list[int], sizes: tuple[int, int]) -> None:
    """Multiples of 1/2 up to 1536 in a block of 128 k: no more bits than FP8 tensor cores add without loss."""
    got, expected = got_and_expected(rows, sizes, token_values=2, exponents=2)
    assert torch.equal(got, expected)


def test_all_exponents_of_a_row(rows: list[int], sizes: tuple[int, int]) -> None:
    """As far apart as they may be. FP8 tensor cores add with about 13 bits below the largest product."""
    got, expected = got_and_expected(rows, sizes, token_values=17, exponents=12)
    assert ((got - expected).norm() / expected.norm()).item() < 2e-3
