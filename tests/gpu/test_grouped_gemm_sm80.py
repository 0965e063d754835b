"""grouped_gemm.cutlass_sm80 against the reference overload. Its PTX runs on every GPU from sm_80 on."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from moe_cases import Call
from torch import Tensor

import torch_moe_ops  # noqa: F401  (registers torch.ops.moe)
from torch_moe_ops.backends import built_backends
from torch_moe_ops.formats import FORMATS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("cutlass_sm80" not in built_backends("grouped_gemm", "cuda"), reason="needs a build for sm80"),
]

ops = torch.ops.moe
PRODUCTS = ["bf16", "fp16", "int8"]
# Rows of each expert. The mean chooses the height of the tiles: 16 up to 16 rows, 64 up to 64, else 128.
ROUTINGS = {
    "none": [0, 0, 0],
    "one_row": [0, 0, 1, 0],
    "decode": [1, 0, 17, 2, 0, 5],
    "ragged": [3, 0, 17, 65, 129, 64],
    "prefill": [300, 0, 127, 129, 1],
    "one_hot_expert": [0] * 40 + [700] + [0] * 30,
    "many_experts": [e % 5 for e in range(257)],
}
UNUSED_ROWS = 7
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}  # half a unit in the last place


def make_call(format: str, rows: list[int], n: int, k: int, bias: torch.dtype | None = None, **options: object) -> Call:
    """Random operands; every unused row of a (for int8, its scale) is NaN."""
    generator = torch.Generator("cuda").manual_seed(n + k)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    fmt = FORMATS[format]
    expert_offsets = torch.tensor([0, *rows], device="cuda").cumsum(0).int()
    a, a_scale = fmt.quantize(randn(sum(rows) + UNUSED_ROWS, k), fmt.act_block)
    b, b_scale = fmt.quantize(randn(len(rows), n, k), fmt.weight_block)
    (a_scale if fmt.has_scale else a)[sum(rows) :] = float("nan")
    if fmt.has_scale:
        options |= {"a_scale": a_scale, "b_scale": b_scale}
    if bias:
        options["bias"] = randn(len(rows), n).to(bias)
    return Call(a, b, expert_offsets, format=format, **options)


def assert_close(call: Call) -> None:
    """|error| <= rounding of out + 2 (K + 2) 2^-23 sum |a b|: two float32 sums of K products and a bias, any order.

    2^-23, not 2^-24: tensor cores cut off bits where IEEE addition rounds.
    """
    got, k = call(ops.grouped_gemm.cutlass_sm80), call.args[0].shape[1]
    expected = call(ops.grouped_gemm.reference, out_dtype=torch.float32)
    magnitude = call.but(call.args[0].abs(), call.args[1].abs())(ops.grouped_gemm.reference, out_dtype=torch.float32)
    used = slice(0, int(call.args[2][-1]))
    tolerance = ROUNDING[got.dtype] * expected.abs() + 2 * (k + 2) * 2.0**-23 * (magnitude.abs() + expected.abs())
    tolerance += 2.0**-25  # half the smallest float16
    assert ((got.float() - expected).abs() <= tolerance)[used].all()  # false for NaN


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("format", PRODUCTS)
def test_matches_the_reference(format, routing):
    assert_close(make_call(format, ROUTINGS[routing], 264, 272))


@pytest.mark.parametrize("n, k", [(8, 16), (8, 4096), (136, 48), (1000, 80), (128, 64), (2880, 2880)])
@pytest.mark.parametrize("format", PRODUCTS)
def test_sizes_that_no_tile_divides(format, n, k):
    assert_close(make_call(format, ROUTINGS["ragged"], n, k))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format", PRODUCTS)
def test_bias_and_output_types(format, bias, out_dtype):
    assert_close(make_call(format, ROUTINGS["decode"], 136, 80, bias, out_dtype=out_dtype))


@pytest.mark.parametrize("format", PRODUCTS)
def test_a_row_does_not_depend_on_the_batch(format):
    """The same rows through tiles of 128, 64 and 16 rows, at other places: equal to the bit."""
    call = make_call(format, [500, 500], 136, 272, out_dtype=torch.float32)
    a, b, _ = call.args
    scale = call.options.get("a_scale")
    batch = call(ops.grouped_gemm.cutlass_sm80)
    for first, last in ((0, 100), (37, 53), (499, 500)):
        offsets = torch.tensor([0, last - first, last - first], device="cuda").int()
        alone = call.but(a[first:last].clone(), b, offsets)
        if scale is not None:
            alone = alone.but(a_scale=scale[first:last].clone())
        assert torch.equal(alone(ops.grouped_gemm.cutlass_sm80), batch[first:last])


def test_replayed_graph_sees_new_routing():
    call = make_call("bf16", ROUTINGS["ragged"], 264, 272)
    offsets = call.args[2]
    call(ops.grouped_gemm.cutlass_sm80)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(ops.grouped_gemm.cutlass_sm80)
    for rows in (ROUTINGS["ragged"][::-1], [0, 0, 278, 0, 0, 0], [0] * 6):
        offsets.copy_(torch.tensor([0, *rows]).cumsum(0))
        graph.replay()
        used = slice(0, sum(rows))
        assert torch.equal(out[used], call(ops.grouped_gemm.cutlass_sm80)[used])
        assert_close(call)


@pytest.mark.parametrize("max_m", [9, 40, 300])  # tiles of 16, 64 and 128 rows
@pytest.mark.parametrize("format", PRODUCTS)
def test_masked_form(format, max_m):
    """Rows that are not in use, or their scales, are NaN; values outside [0, max_m] are clamped."""
    experts, device = 40, "cuda"
    full = make_call(format, [max_m] * experts, 264, 272, out_dtype=torch.float32)
    a, b, offsets = full.args
    everything = full(ops.grouped_gemm.cutlass_sm80)
    masked_m = torch.randint(0, max_m + 1, (experts,), device=device).int()
    masked_m[:4] = torch.tensor([-5, 0, max_m, 2**31 - 1])
    used = torch.zeros(len(a), dtype=torch.bool, device=device)
    used[: experts * max_m] = (torch.arange(max_m, device=device) < masked_m[:, None]).flatten()
    poisoned = full.options.get("a_scale", a)
    poisoned[~used] = float("nan")
    got = full(ops.grouped_gemm.cutlass_sm80, expert_rows=masked_m)
    assert torch.equal(got[used], everything[used]) and everything[used].isfinite().all()


@pytest.mark.parametrize("format, n, k, reason", [
    ("bf16", 16, 20, "k must be a multiple of 16 bytes"),
    ("int8", 16, 24, "k must be a multiple of 16 bytes"),
    ("fp16", 12, 16, "n must be a multiple of 8"),
])  # fmt: skip
def test_says_what_it_cannot_run(format, n, k, reason):
    with pytest.raises(RuntimeError, match=reason):
        make_call(format, [3, 2], n, k)(ops.grouped_gemm.cutlass_sm80)


@pytest.mark.parametrize("b_parts", [0, 2**32, 2**33])
def test_parts_that_are_no_int32(b_parts):
    """Of no columns, which every number divides. Refused by the kernel, too, behind Python's check."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for op in (ops.grouped_gemm.cutlass_sm80, partial(ops.grouped_gemm.cutlass_sm80.redispatch, cuda)):
        with pytest.raises(RuntimeError, match="b_parts: expected 1 to 2147483647, got"):
            make_call("bf16", [3, 2], 0, 64)(op, b_parts=b_parts)


def test_an_error_of_another_kernel_is_not_this_ones():
    major, minor = torch.cuda.get_device_capability()
    others = [family for family in (90, 100) if f"cutlass_sm{family}" in built_backends("grouped_gemm", "cuda")]
    others = [family for family in others if family // 10 != major]  # sm120 has no bf16
    if not others:
        pytest.skip(f"needs a build for another family than sm_{major}{minor}")
    call = make_call("bf16", ROUTINGS["ragged"], 264, 272)
    used = slice(0, sum(ROUTINGS["ragged"]))
    expected = call(ops.grouped_gemm.cutlass_sm80)[used]
    for family in others:
        with pytest.raises(RuntimeError, match="grouped_gemm: CUDA: "):
            call(getattr(ops.grouped_gemm, f"cutlass_sm{family}"))
        assert torch.equal(call(ops.grouped_gemm.cutlass_sm80)[used], expected)
