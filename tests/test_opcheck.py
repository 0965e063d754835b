"""torch.library.opcheck on every overload that runs on a CPU, in every format: fakes give exact sizes and strides."""

from __future__ import annotations

import os

import pytest
import torch
from moe_cases import Call, make_moe, opcheck

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS, quantize_weight

NAMES = ["default", "reference"] + ["triton"] * (os.environ.get("TRITON_INTERPRET") == "1")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def routing(alignment: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[0, 2], [2, -1], [1, 2], [2, 0], [2, 1]]).int()
    return moe.sort_slots(ids, 4, alignment=alignment)


def activations(format: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.float16 if format == "fp16" else torch.bfloat16)


def test_topk(name: str) -> None:
    op = getattr(torch.ops.moe.topk, name)
    opcheck(op, Call(torch.randn(5, 16), 3))
    opcheck(
        op,
        Call(
            torch.randn(5, 16).half(),
            3,
            scoring="sigmoid",
            correction_bias=torch.randn(16),
            num_groups=4,
            topk_groups=2,
        ),
    )


@pytest.mark.parametrize("alignment", [1, 8])
def test_sort_slots(name: str, alignment: int) -> None:
    op = getattr(torch.ops.moe.sort_slots, name)
    opcheck(op, Call(torch.tensor([[0, 2], [1, -1]]).int(), 3, alignment=alignment))
    opcheck(op, Call(torch.tensor([[0, 2]]).int(), 2, expert_map=torch.tensor([0, -1, 1]).int(), alignment=alignment))


def test_quantize(name: str, format: str) -> None:
    opcheck(getattr(torch.ops.moe.quantize, name), Call(torch.randn(5, 160), format))


def test_permute(name: str, format: str) -> None:
    offsets, slot_to_row, row_to_slot = routing()
    x = activations(format, 5, 160)
    options = {"format": format}
    if FORMATS[format].has_global_scale:
        options |= {"global_scale": torch.rand(4), "expert_offsets": offsets}
    opcheck(getattr(torch.ops.moe.permute, name), Call(x, slot_to_row, len(row_to_slot), **options))


def test_grouped_gemm(name: str, format: str) -> None:
    if name == "triton" and format not in ("bf16", "fp16", "int8", "fp8_block"):
        pytest.skip("no portable GEMM")
    fmt = FORMATS[format]
    a, a_scale = fmt.quantize(torch.randn(10, 160), fmt.act_block)
    b, b_scale, b_global_scale = quantize_weight(torch.randn(4, 48, 160), format, parts=2)
    call = Call(
        a, b, routing()[0], a_scale=a_scale, b_scale=b_scale, b_global_scale=b_global_scale, format=format, b_parts=2
    )
    opcheck(getattr(torch.ops.moe.grouped_gemm, name), call)


def test_act_mul(name: str, format: str) -> None:
    opcheck(getattr(torch.ops.moe.act_mul, name), Call(activations(format, 10, 160), routing()[0], format=format))


def test_finalize(name: str) -> None:
    op = getattr(torch.ops.moe.finalize, name)
    opcheck(op, Call(torch.randn(10, 32), routing()[1], topk_weights=torch.rand(5, 2)))


def test_fused_moe(name: str, format: str) -> None:
    if name == "triton" and format not in ("bf16", "fp16", "int8", "fp8_block"):
        pytest.skip("no portable GEMM")
    opcheck(getattr(torch.ops.moe.fused_moe, name), make_moe(format, num_tokens=5, bias=True))


def test_strides_of_fake_and_real_results(format: str) -> None:
    """opcheck compares strides where sizes are above 1; here also for no rows, one row, and the MN-major scale."""
    offsets = routing()[0]
    for rows in (0, 1, 2, 5, 8):
        x = activations(format, rows, 256)
        slot_to_row = torch.arange(rows).int().view(rows, 1)
        calls = {
            "quantize": Call(x, format),
            "permute": Call(x, slot_to_row, rows, format=format),
            "act_mul": Call(x, offsets * 0, format=format),
        }
        for op, call in calls.items():
            real = call(getattr(torch.ops.moe, op).default)
            meta = Call(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in call.args), **call.options)
            fake = meta(getattr(torch.ops.moe, op).default)
            for a, b in zip(real, fake, strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), (op, rows)
