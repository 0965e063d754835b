"""What the block-scaled grouped GEMMs of Blackwell read, without one: their setup, run on a CPU through
torch_moe_ops._host. Skipped where the build found no pybind11."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_moe_ops.formats import FORMATS

host = pytest.importorskip("torch_moe_ops._host", reason="needs the optional module, which is built with pybind11")

BLOCK_K = {"nvfp4": 16, "mxfp8": 32, "mxfp4": 32}
# Weights, activations.
PAIRS = [("nvfp4", "nvfp4"), ("mxfp8", "mxfp8"), ("mxfp4", "mxfp4"), ("mxfp4", "mxfp8")]


def tensor(data: bytes, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.frombuffer(bytearray(data) or bytearray(1), dtype=dtype)[: len(data) // dtype.itemsize].view(shape)


def nonzero_bytes(*shape: int) -> Tensor:
    return torch.randint(1, 256, shape).to(torch.uint8)


def row_bytes(format: str, k: int) -> int:
    return k // FORMATS[format].pack * FORMATS[format].dtype.itemsize


def check_groups(
    format: str,
    act_format: str,
    sizes: list[int],
    n: int,
    k: int,
    given_atoms: bool = False,
    expert_rows: list[int] | None = None,
    float32_out: bool = False,
) -> None:
    """Each expert's entry, and each scale where CUTLASS's layout finds it; all it may read besides is zero, or a scale
    of a row that the expert has and does not use."""
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    num_experts, columns = len(sizes), -(-k // BLOCK_K[format])
    rows = int(offsets[-1]) + 3  # the last three are no expert's
    a_scale, b_scale = nonzero_bytes(rows, columns), nonzero_bytes(num_experts, n, columns)
    data = (a_scale.numpy().tobytes(), b_scale.numpy().tobytes(), offsets.numpy().tobytes())
    options = {"given_atoms": given_atoms, "float32_out": float32_out}
    out_bytes = 4 if float32_out else 2
    counts = torch.tensor(sizes)
    if expert_rows is not None:
        options["expert_rows"] = torch.tensor(expert_rows, dtype=torch.int32).numpy().tobytes()
        counts = torch.tensor(expert_rows).clamp(min=0).minimum(counts)
    read = host.read_block_scaled(format, act_format, *data, rows, n, k, **options)
    a_bytes, b_bytes = row_bytes(act_format, k), row_bytes(format, k)
    expected = [
        [count, n, k, first * a_bytes, e * n * b_bytes, first * n * out_bytes, e * n * 2, e * n * 4, k, n]
        for e, (count, first) in enumerate(zip(counts.tolist(), offsets.tolist(), strict=False))
    ]
    used = torch.cat([torch.arange(first, first + count) for count, first in zip(counts, offsets, strict=False)])
    assert tensor(read["table"], torch.int64, num_experts, 10).tolist() == expected
    assert torch.equal(tensor(read["a_scale"], torch.uint8, len(used), columns), a_scale[used])
    assert torch.equal(tensor(read["b_scale"], torch.uint8, num_experts, n, columns), b_scale)
    assert read["padding_is_zero"] or expert_rows is not None
    assert (tensor(read["alpha"], torch.float32, num_experts, n) == 1).all()


@pytest.mark.parametrize("format, act_format", PAIRS)
@pytest.mark.parametrize("n, k", [(8, 32), (136, 7168), (384, 96), (256, 544)])
def test_s4_groups_and_scales(format: str, act_format: str, n: int, k: int) -> None:
    check_groups(format, act_format, [5, 0, 128, 1, 0, 0, 257, 127, 0], n, k)


def test_a_float32_output_starts_its_rows_twice_as_far_apart() -> None:
    check_groups("nvfp4", "nvfp4", [5, 0, 128, 1], 136, 64, float32_out=True)


@pytest.mark.parametrize("format, act_format", PAIRS)
def test_s2_10_weight_scales_may_be_packed_before_the_call(format: str, act_format: str) -> None:
    for n, k in ((8, 32), (136, 7168), (384, 96)):
        check_groups(format, act_format, [5, 0, 128, 1], n, k, given_atoms=True)


@settings(max_examples=40, deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    counts=st.lists(st.sampled_from([0, 0, 1, 5, 127, 128, 129, 300]), min_size=1, max_size=7),
    n=st.integers(1, 40),
    k=st.integers(1, 12),
)
def test_s4_groups_of_any_size(pair: tuple[str, str], counts: list[int], n: int, k: int) -> None:
    check_groups(*pair, counts, 8 * n, 32 * k)


@settings(max_examples=40, deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    max_m=st.sampled_from([0, 1, 5, 128, 130, 300]),
    masked_m=st.lists(st.sampled_from([0, 1, 5, 127, 128, 129, 300, -1, 2**31 - 1, -(2**31)]), min_size=1, max_size=7),
    n=st.integers(1, 40),
    k=st.integers(1, 12),
)
def test_s0_6_groups_of_the_masked_form(pair: tuple[str, str], max_m: int, masked_m: list[int], n: int, k: int) -> None:
    """As many rows as masked_m says; outside [0, max_m] it is clamped."""
    check_groups(*pair, [max_m] * len(masked_m), 8 * n, 32 * k, expert_rows=masked_m)


def test_s4_the_global_scales_of_gate_and_up_stay_apart() -> None:
    n, k, num_experts = 16, 32, 3
    scales = (b"\1" * 2, b"\1" * (num_experts * n * 2), torch.tensor([0, 1, 1, 1]).int().numpy().tobytes())
    a, b = torch.rand(num_experts) + 0.1, torch.rand(num_experts, 2) + 0.1

    def alpha(a_global: Tensor, b_global: Tensor) -> Tensor:
        given = a_global.numpy().tobytes(), b_global.contiguous().numpy().tobytes()
        return tensor(
            host.read_block_scaled("nvfp4", "nvfp4", *scales, 1, n, k, *given)["alpha"], torch.float32, num_experts, n
        )

    assert torch.equal(alpha(a, b), (a[:, None] * b).repeat_interleave(n // 2, dim=1))
    assert torch.equal(alpha(a[:1], b), (a[0] * b).repeat_interleave(n // 2, dim=1))
    assert torch.equal(alpha(a, b[:, 0]), (a * b[:, 0])[:, None].expand(num_experts, n))
    assert torch.equal(alpha(torch.empty(0), torch.empty(0)), torch.ones(num_experts, n))
