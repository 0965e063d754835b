"""pack_scale and unpack_scale of the Triton backend against the reference, every byte."""

import pytest
import torch

import torch_moe_ops  # noqa: F401  (registers torch.ops.moe)
from torch_moe_ops.scale_layouts import SCALE_LAYOUTS

ops = torch.ops.moe


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("shape", [(128, 4), (256, 13), (2, 128, 9), (1, 1), (130, 5), (3, 33, 2), (0, 4), (5, 0)])
def test_both_directions(layout, shape):
    if layout == "utccp" and shape[-2] % 128:
        pytest.skip("utccp takes whole 128 rows")
    scale = torch.randint(0, 256, shape).to(torch.uint8)
    for source in (scale, scale.mT.contiguous().mT):
        packed, expected = ops.pack_scale.triton(source, layout), ops.pack_scale.reference(scale, layout)
        assert packed.stride() == expected.stride() and torch.equal(packed, expected)
        back = ops.unpack_scale.triton(packed, layout, *shape[-2:], torch.uint8)
        assert torch.equal(back, scale)


def test_experts():
    offsets = torch.tensor([0, 5, 5, 140, 268]).int()
    scale = torch.randint(0, 256, (270, 9)).to(torch.uint8)
    packed = ops.pack_scale.triton(scale, "atom", expert_offsets=offsets)
    assert torch.equal(packed, ops.pack_scale.reference(scale, "atom", expert_offsets=offsets))
    back = ops.unpack_scale.triton(packed, "atom", 270, 9, torch.uint8, expert_offsets=offsets)
    assert torch.equal(back[:268], scale[:268])
