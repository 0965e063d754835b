"""What is plain torch gives the same bits on a GPU as on a CPU: conversions, orders of w13, computed global scales, and
checkpoints loaded straight to the GPU. The CUDA quantisers take computed global scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.backends import built_backends
from torch_moe_ops.checkpoints import load_experts
from torch_moe_ops.experts import from_gate_up, to_gate_up
from torch_moe_ops.formats import FORMATS, quantize_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def as_bytes(x: Tensor) -> Tensor:
    return x.cpu().contiguous().flatten().view(torch.uint8)


def on_gpu(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


def assert_same(got: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.is_cuda and one.dtype == other.dtype and torch.equal(as_bytes(one), as_bytes(other))


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("format", ["fp8_block", "mxfp8", "mxfp4", "nvfp4"])
def test_convert_weight(format: str, to: str) -> None:
    weight = torch.randn(3, 2 * 96, 320, generator=torch.Generator().manual_seed(0)) * 0.02
    stored = quantize_weight(weight, format, parts=2)
    results = []
    for values, scale, global_scale in (stored, on_gpu(stored)):
        results.append(moe.convert_weight(values, scale, format, to, weight_global_scale=global_scale, parts=2))
    assert_same(results[1][:3], results[0][:3])
    torch.testing.assert_close(results[1].error.cpu(), results[0].error, rtol=1e-9, atol=1e-12)


def test_fold_global_scale() -> None:
    weight = torch.randn(3, 2 * 64, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    values, scale, global_scale = quantize_weight(weight, "nvfp4", parts=2)
    for into in (None, global_scale.amax(1)):
        expected = moe.fold_global_scale(values, scale, global_scale, into=into, parts=2)
        arguments = on_gpu((values, scale, global_scale))
        got = moe.fold_global_scale(*arguments, into=None if into is None else into.cuda(), parts=2)
        assert_same(got[:3], expected[:3])
        torch.testing.assert_close(got.error.cpu(), expected.error, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16])
def test_orders_of_w13(dtype: torch.dtype) -> None:
    w13 = torch.randint(0, 120, (2, 64, 5)).to(torch.uint8)
    w13 = w13.to(dtype) if dtype == torch.bfloat16 else w13.view(dtype)
    for layout, group in (("up_gate", 1), ("interleaved", 1), ("interleaved", 8), ("interleaved", 16)):
        other = from_gate_up(w13.cuda(), layout, group=group)
        assert torch.equal(as_bytes(other), as_bytes(from_gate_up(w13, layout, group=group)))
        assert torch.equal(as_bytes(to_gate_up(other, layout, group=group)), as_bytes(w13))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_quantisers_with_a_computed_global_scale(backend: str) -> None:
    if backend not in built_backends("quantize", "cuda"):
        pytest.skip(f"needs the {backend} backend")
    for size in (1e-6, 1.0, 1e6):
        x = (torch.randn(70, 7168, generator=torch.Generator().manual_seed(2)) * size).bfloat16()
        global_scale = moe.compute_global_scale(x)
        assert torch.equal(moe.compute_global_scale(x.cuda()).cpu(), global_scale)
        expected = torch.ops.moe.quantize.reference(x, "nvfp4", global_scale=global_scale)
        got = getattr(torch.ops.moe.quantize, backend)(x.cuda(), "nvfp4", global_scale=global_scale.cuda())
        assert_same(got, expected)


def test_checkpoints_load_to_the_gpu(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {}
    for expert in range(3):
        for name, rows, k in (("gate_proj", 64, 128), ("up_proj", 64, 128), ("down_proj", 128, 64)):
            values, scale, global_scale = quantize_weight(torch.randn(1, rows, k), "nvfp4")
            parts = {"weight": values[0], "weight_scale": scale[0], "weight_scale_2": global_scale.reshape(())}
            tensors |= {f"experts.{expert}.{name}.{suffix}": tensor for suffix, tensor in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    on_cpu, on_cuda = (load_experts(tmp_path, "experts", device=device) for device in ("cpu", "cuda"))
    names = [name for name, value in on_cpu.items() if isinstance(value, Tensor)]
    assert_same(tuple(on_cuda[name] for name in names), tuple(on_cpu[name] for name in names))
