"""PyTorch's opcheck on every overload that runs here, in every format: fakes give exact sizes and strides."""

from __future__ import annotations

import pytest
import torch
from moe_cases import Call, make_moe, opcheck
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.backends import GEMM_FORMATS, GEMM_OPS, built_backends
from torch_moe_ops.formats import FORMATS, quantize_weight
from torch_moe_ops.scale_layouts import SCALE_LAYOUTS

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def check(op: str, device: str, call: Call, format: str = "bf16") -> None:
    """opcheck of the default overload and of every backend that takes this format on this device."""
    answer = moe.explain(op, device=device, format=format)
    names = [verdict.backend for verdict in answer.verdicts if verdict.reason is None]
    names += ["default"] * bool(names) + ["reference"]
    interpreted = device == "cpu" and "triton" in built_backends(op, "cpu")
    if interpreted and (op not in GEMM_OPS or format in GEMM_FORMATS["triton"]):
        names.append("triton")
    for name in dict.fromkeys(names):
        opcheck(getattr(getattr(torch.ops.moe, op), name), call.to(device))


def routing() -> tuple[Tensor, Tensor, Tensor]:
    """Every row is in use: opcheck compares the rows that are unspecified, too."""
    return moe.sort_slots(torch.tensor([[0, 2], [2, 1], [1, 2], [2, 0], [2, 1]]).int(), 4)


def activations(format: str, *shape: int) -> Tensor:
    return torch.randn(shape).to(torch.float16 if format == "fp16" else torch.bfloat16)


def test_topk(device: str) -> None:
    check("topk", device, Call(torch.randn(5, 16), 3))
    options = {"scoring": "sigmoid", "correction_bias": torch.randn(16), "num_groups": 4, "topk_groups": 2}
    check("topk", device, Call(torch.randn(5, 16).half(), 3, **options))


@pytest.mark.parametrize("alignment", [1, 8])
def test_sort_slots(device: str, alignment: int) -> None:
    check("sort_slots", device, Call(torch.tensor([[0, 2], [1, -1]]).int(), 3, alignment=alignment))
    expert_map = torch.tensor([0, -1, 1]).int()
    check("sort_slots", device, Call(torch.tensor([[0, 2]]).int(), 2, expert_map=expert_map, alignment=alignment))


def test_quantize(device: str, format: str) -> None:
    check("quantize", device, Call(torch.randn(5, 160), format), format)


def test_permute(device: str, format: str) -> None:
    offsets, slot_to_row, row_to_slot = routing()
    options = {"format": format}
    if FORMATS[format].has_global_scale:
        options |= {"global_scale": torch.rand(4), "expert_offsets": offsets}
    check("permute", device, Call(activations(format, 5, 160), slot_to_row, len(row_to_slot), **options), format)


def test_grouped_gemm(device: str, format: str) -> None:
    fmt = FORMATS[format]
    a, a_scale = fmt.quantize(torch.randn(10, 160), fmt.act_block)
    b, b_scale, b_global_scale = quantize_weight(torch.randn(4, 48, 160), format, parts=2)
    offsets, scales = routing()[0], {"a_scale": a_scale, "b_scale": b_scale, "b_global_scale": b_global_scale}
    for expert_rows in (None, offsets.diff()):
        call = Call(a, b, offsets, **scales, expert_rows=expert_rows, format=format, b_parts=2)
        check("grouped_gemm", device, call, format)


def test_act_mul(device: str, format: str) -> None:
    check("act_mul", device, Call(activations(format, 10, 160), routing()[0], format=format), format)


def test_finalize(device: str) -> None:
    check("finalize", device, Call(torch.randn(10, 32), routing()[1], topk_weights=torch.rand(5, 2)))


def test_fused_moe(device: str, format: str) -> None:
    check("fused_moe", device, make_moe(format, num_tokens=5, bias=True), format)


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("shape", [(256, 10), (3, 128, 9)])
def test_pack_scale_and_unpack_scale(device: str, layout: str, shape: tuple[int, ...]) -> None:
    scale = torch.randint(0, 255, shape).to(torch.uint8)  # no NaN, which opcheck finds unequal
    options = [{}]
    if layout == "atom" and len(shape) == 2:
        options.append({"expert_offsets": torch.tensor([0, 100, 100, 256]).int()})
    for option in options:
        check("pack_scale", device, Call(scale.view(torch.float8_e8m0fnu), layout, **option))
        packed = moe.pack_scale(scale, layout, **option)
        check("unpack_scale", device, Call(packed, layout, *shape[-2:], torch.uint8, **option))


def test_strides_of_fake_and_real_results(device: str, format: str) -> None:
    """opcheck compares strides where sizes are above 1; here also for no rows, one row, and the MN-major scale."""
    offsets = routing()[0]
    for rows in (0, 1, 2, 5, 8):
        x = activations(format, rows, 256)
        calls = {
            "quantize": Call(x, format),
            "permute": Call(x, torch.arange(rows).int().view(rows, 1), rows, format=format),
            "act_mul": Call(x, offsets * 0, format=format),
        }
        for op, call in calls.items():
            expect_metadata_of_fake(op, call, device)


def test_strides_of_fake_and_real_routing_and_scales(device: str) -> None:
    for rows in (0, 1, 2):
        for top_k in (1, 3):
            expect_metadata_of_fake("topk", Call(torch.randn(rows, 16), top_k), device)
        for hidden_size in (1, 8):
            slots = torch.zeros(rows, 2).int()
            expect_metadata_of_fake("finalize", Call(torch.randn(4, hidden_size), slots), device)
        for layout in ("words", "atom"):
            packed = moe.pack_scale(torch.zeros(rows, 5).byte(), layout)
            expect_metadata_of_fake("unpack_scale", Call(packed, layout, rows, 5, torch.uint8), device)


def expect_metadata_of_fake(op: str, call: Call, device: str) -> None:
    overload = getattr(torch.ops.moe, op).default
    results = (call.to(place)(overload) for place in (device, "meta"))
    as_tuples = (result if isinstance(result, tuple) else (result,) for result in results)
    for real, fake in zip(*as_tuples, strict=True):
        expected = (fake.shape, fake.stride(), fake.dtype)
        assert (real.shape, real.stride(), real.dtype) == expected, (op, call.args[1:], real.shape)
