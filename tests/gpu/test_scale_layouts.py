"""pack_scale and unpack_scale on a GPU, `cuda` and `triton`, against the reference on a CPU: bytes and strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_moe_ops  # noqa: F401  (registers torch.ops.moe)
from torch_moe_ops.backends import built_backends
from torch_moe_ops.scale_layouts import SCALE_LAYOUTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BACKENDS = ["cuda", "triton"]
# (leading dimension or 0, rows, columns): nothing, one, ragged, whole atoms, DeepSeek-V4-Pro's w13 of an expert.
SHAPES = [(0, 0, 5), (0, 5, 0), (0, 1, 1), (0, 130, 13), (3, 129, 9), (2, 256, 24), (0, 6144, 448), (0, 12288, 224)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and "cuda" not in built_backends("pack_scale", "cuda"):
        pytest.skip("needs the CUDA library")
    return request.param


def random_scale(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.uint8)


def check(backend: str, scale: Tensor, layout: str, **options: Tensor) -> None:
    """Both directions; padding is compared too, on top of memory full of ones."""
    rows, columns = scale.shape[-2:]
    expected = torch.ops.moe.pack_scale.reference(scale, layout, **options)
    on_gpu = {name: value.cuda() for name, value in options.items()}
    dirty = torch.full((expected.numel() * expected.element_size() + 4096,), 0xFF, dtype=torch.uint8, device="cuda")
    del dirty  # the allocator hands the same memory out again
    packed = getattr(torch.ops.moe.pack_scale, backend)(scale.cuda(), layout, **on_gpu)
    assert (packed.shape, packed.stride(), packed.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert torch.equal(packed.cpu(), expected)
    back = getattr(torch.ops.moe.unpack_scale, backend)(packed, layout, rows, columns, scale.dtype, **on_gpu)
    used = int(options["expert_offsets"][-1]) if options else rows
    assert back.is_contiguous() and torch.equal(back.cpu()[..., :used, :], scale[..., :used, :])


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_against_the_reference(backend: str, layout: str) -> None:
    for lead, rows, columns in SHAPES:
        if layout == "utccp":
            rows = rows // 128 * 128
        scale = random_scale(*([lead] * bool(lead)), rows, columns)
        check(backend, scale, layout)
        check(backend, scale.mT.contiguous().mT, layout)


def test_experts_have_atoms_of_their_own(backend: str) -> None:
    for counts in ([0], [5], [128, 0, 1, 300], [0, 0, 129], [17] * 48, [0] * 383 + [4096]):
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        check(backend, random_scale(int(offsets[-1]) + 3, 112), "atom", expert_offsets=offsets)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_eight_bit_floats_keep_their_bits(backend: str, dtype: torch.dtype) -> None:
    scale = random_scale(200, 10)
    for layout in ("words", "words_mn", "atom"):
        packed = getattr(torch.ops.moe.pack_scale, backend)(scale.cuda().view(dtype), layout)
        back = getattr(torch.ops.moe.unpack_scale, backend)(packed, layout, 200, 10, dtype)
        assert back.dtype == dtype and torch.equal(back.view(torch.uint8).cpu(), scale)


def test_in_a_replayed_graph(backend: str) -> None:
    """Offsets and scales may change between replays."""
    offsets, scale = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda"), random_scale(300, 28).cuda()
    pack = getattr(torch.ops.moe.pack_scale, backend)
    pack(scale, "atom", expert_offsets=offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = pack(scale, "atom", expert_offsets=offsets)
    for second in (1, 128, 300):
        offsets[1] = second
        scale.copy_(random_scale(300, 28).roll(second))
        graph.replay()
        expected = torch.ops.moe.pack_scale.reference(scale.cpu(), "atom", expert_offsets=offsets.cpu())
        assert torch.equal(packed.cpu(), expected)
