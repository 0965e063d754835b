"""The portable Triton kernels on a GPU against the reference overloads, at sizes that fill it; graphs and compile."""

import importlib

import moe_cases
import pytest
import torch
from exact_operands import COMBINATIONS, MAX_K, Operands

import torch_moe_ops
from torch_moe_ops.formats import FORMATS
from torch_moe_ops.reference.fused_moe import fused_moe as reference_fused_moe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ops = torch.ops.moe
GEMM_FORMATS = ["bf16", "fp16", "fp8_block", "int8"]
# (tokens, experts, top_k, hidden, intermediate); gpt-oss's 2880 is ragged for 128-blocks.
SHAPES = {"decode": (1, 32, 4, 1024, 512), "ragged": (77, 16, 4, 2880, 720), "prefill": (2048, 32, 8, 2048, 768)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, device="cuda", generator=generator(seed)).to(dtype)


def hidden_dtype(format: str) -> torch.dtype:
    return torch.float16 if format == "fp16" else torch.bfloat16


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
    is_nan = got.float().isnan()
    assert torch.equal(is_nan, expected.float().isnan())
    differs = got.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)
    assert not (differs.view(*got.shape, got.element_size()).any(-1) & ~is_nan).any()


def make_moe(format: str, shape: str) -> tuple[tuple, dict]:
    """Arguments of fused_moe."""
    tokens, experts, top_k, hidden, intermediate = SHAPES[shape]
    fmt, dtype = FORMATS[format], hidden_dtype(format)
    w13 = randn(experts, 2 * intermediate, hidden, dtype=dtype, seed=1) / hidden**0.5
    w2 = randn(experts, hidden, intermediate, dtype=dtype, seed=2) / intermediate**0.5
    w13_values, w13_scale = fmt.quantize(w13, fmt.weight_block, None, 2)
    w2_values, w2_scale = fmt.quantize(w2, fmt.weight_block)
    weights, ids = ops.topk.triton(randn(tokens, experts, dtype=torch.float32, seed=3), top_k)
    scales = {"w13_scale": w13_scale, "w2_scale": w2_scale} if fmt.has_scale else {}
    hidden_states = randn(tokens, hidden, dtype=dtype, seed=4)
    return (hidden_states, w13_values, w2_values, weights, ids), {"format": format, **scales}


@pytest.mark.parametrize("format", FORMATS)
def test_quantisers_are_bit_exact(format):
    dtype = hidden_dtype(format)
    x = randn(300, 2880, dtype=dtype) * randn(300, 1, dtype=dtype, seed=1).float().mul(5).exp2().to(dtype)
    x[0, 3], x[1, 5], x[2] = float("nan"), float("inf"), 0.0
    for got, expected in zip(ops.quantize.triton(x, format), ops.quantize.reference(x, format), strict=True):
        assert_same_bits(got, expected)
    slot_to_row = torch.randperm(600, device="cuda", generator=generator(2)).int().view(300, 2)
    for weights in (None, torch.rand(300, 2, device="cuda", generator=generator(3))):
        arguments = (x, slot_to_row, 600)
        got = ops.permute.triton(*arguments, format=format, topk_weights=weights)
        expected = ops.permute.reference(*arguments, format=format, topk_weights=weights)
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])
    gate_up, expert_offsets = x[:, : 2 * 704].contiguous(), torch.tensor([0, 100, 300], device="cuda").int()
    got = ops.act_mul.triton(gate_up, expert_offsets, activation="relu", format=format)
    expected = ops.act_mul.reference(gate_up, expert_offsets, activation="relu", format=format)
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[1], expected[1])


@pytest.mark.parametrize(
    "num_experts, num_groups, topk_groups, top_k", [(256, 8, 4, 8), (384, 1, 1, 6), (160, 8, 3, 6)]
)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_topk(num_experts, num_groups, topk_groups, top_k, scoring):
    # Distinct multiples of 1/64 per token: no two choices are closer than the exponentials' errors.
    order = torch.rand(500, num_experts, device="cuda", generator=generator()).argsort(-1)
    logits = (order.float() - num_experts / 2) / 64
    options = {"scoring": scoring, "num_groups": num_groups, "topk_groups": topk_groups}
    weights, ids = ops.topk.triton(logits, top_k, **options)
    expected_weights, expected_ids = ops.topk.reference(logits, top_k, **options)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "tokens, num_experts, top_k", [(1, 256, 8), (5000, 256, 8), (30000, 8, 2), (3000, 384, 6), (9, 1, 1)]
)
@pytest.mark.parametrize("alignment", [1, 128])
def test_sort_slots(tokens, num_experts, top_k, alignment):
    ids = torch.randint(-1, num_experts, (tokens, top_k), device="cuda", generator=generator(), dtype=torch.int32)
    got = ops.sort_slots.triton(ids, num_experts, alignment=alignment)
    for mine, expected in zip(got, ops.sort_slots.reference(ids, num_experts, alignment=alignment), strict=True):
        assert torch.equal(mine, expected)
    ids[0, 0] = num_experts
    assert ops.sort_slots.triton(ids, num_experts)[1][0, 0] == -2


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_finalize(out_dtype):
    expert_out = randn(4000, 2880, dtype=out_dtype)
    slot_to_row = torch.randperm(4000, device="cuda", generator=generator(1)).int().view(1000, 4)
    slot_to_row[::3, 1], slot_to_row[5, 2] = -1, -2
    options = {"topk_weights": torch.rand(1000, 4, device="cuda", generator=generator(2)), "routed_scaling_factor": 2.5}
    got = ops.finalize.triton(expert_out, slot_to_row, **options)
    torch.testing.assert_close(
        got, ops.finalize.reference(expert_out, slot_to_row, **options), rtol=0, atol=0, equal_nan=True
    )
    assert got[5].isnan().all()


@pytest.mark.parametrize("format", GEMM_FORMATS)
@pytest.mark.parametrize("routing", ["uneven", "hot"])
@pytest.mark.parametrize("rows, n, k", [(40, 5760, 2880), (3000, 1440, 720)])
def test_grouped_gemm(format, routing, rows, n, k):
    """Small integers and power-of-two scales: float32 sums are exact, so equality is asked for."""
    fmt, experts, g = FORMATS[format], 8, generator(5)
    used = rows - 7
    offsets = [0, 1, 1, used // 3, used // 2, used // 2, used - 3, used - 1, used]
    offsets = torch.tensor(offsets if routing == "uneven" else [0] * 5 + [used] * 4, device="cuda", dtype=torch.int32)
    a = torch.randint(-2, 3, (rows, k), device="cuda", generator=g).float()
    b = torch.randint(-2, 3, (experts, n, k), device="cuda", generator=g).float()
    scales = {}
    if fmt.has_scale:
        a_shape, b_shape = fmt.act_scale_shape(rows, k), (experts, *fmt.weight_scale_shape(n, k, 2))
        b_parts = 2 if format == "fp8_block" else 1
        scales = {
            "a_scale": torch.randint(-2, 3, a_shape[::-1], device="cuda", generator=g).float().exp2().t(),
            "b_scale": torch.randint(-2, 3, b_shape, device="cuda", generator=g).float().exp2(),
            "b_parts": b_parts,
        }
        scales["a_scale"][used:] = float("nan")
    if fmt.dtype != torch.int8:
        a[used:] = float("nan")
    bias = torch.randint(-8, 9, (experts, n), device="cuda", generator=g).to(torch.bfloat16)
    options = {**scales, "bias": bias, "format": format, "out_dtype": torch.float32}
    a, b = a.to(fmt.dtype), b.to(fmt.dtype)
    got = ops.grouped_gemm.triton(a, b, offsets, **options)
    assert torch.equal(got[:used], ops.grouped_gemm.reference(a, b, offsets, **options)[:used])


def exact_gemm(format: str, act_format: str, rows: int) -> tuple[tuple, dict]:
    """Arguments of grouped_gemm whose result is exact in float32."""
    fmt, g = FORMATS[format], generator(6)
    a = torch.randint(-2, 3, (rows, 720), device="cuda", generator=g).to(FORMATS[act_format].dtype)
    b = torch.randint(-2, 3, (4, 480, 720), device="cuda", generator=g).to(fmt.dtype)
    b_scale = torch.randint(-2, 3, (4, *fmt.weight_scale_shape(480, 720)), device="cuda", generator=g).float().exp2()
    offsets = torch.tensor([0, rows // 3, rows // 3, rows - 1, rows], device="cuda", dtype=torch.int32)
    options = {"b_scale": b_scale, "format": format, "act_format": act_format, "out_dtype": torch.float32}
    return (a, b, offsets), options


@pytest.mark.parametrize("rows", [40, 3000])
@pytest.mark.parametrize("format", ["fp8_block", "int8"])
@pytest.mark.parametrize("act_format", ["bf16", "fp16"])
def test_weight_only(format, act_format, rows):
    arguments, options = exact_gemm(format, act_format, rows)
    got = ops.grouped_gemm.triton(*arguments, **options)
    assert torch.equal(got, ops.grouped_gemm.reference(*arguments, **options))


@pytest.mark.parametrize("format, act_format", COMBINATIONS)
@pytest.mark.parametrize("rows, n, k", [(40, 272, 216), (1200, 512, MAX_K)])
@pytest.mark.parametrize("sm", [None, 80])
def test_every_combination(monkeypatch, sm, rows, n, k, format, act_format):
    """As this GPU runs it, and as one without FP8 and with an A100's shared memory would."""
    module = importlib.import_module("torch_moe_ops.triton.grouped_gemm")
    if sm is not None:
        monkeypatch.setattr(module, "_gpu", lambda device: module.Gpu(sm, 163 << 10))
    third = rows // 3
    operands = Operands(
        format, act_format, [0, third, third, rows - 1, rows], rows, n, k,
        parts=2, expert_rows=[third - 3, 0, third, 1], device="cuda",
    )  # fmt: skip
    operands.check(module.grouped_gemm(*operands.arguments, **operands.options))
    operands.options["expert_rows"] += 2  # clamped, but for the first and third: rows beyond those in use
    operands.check(module.grouped_gemm(*operands.arguments, **operands.options))


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "nvfp4"])
def test_scales_in_atoms(format):
    operands = Operands(format, format, [0, 100, 300], 300, 272, 216, parts=2, device="cuda")
    operands.options["b_scale"] = ops.pack_scale.triton(operands.options["b_scale"], "atom")
    operands.check(ops.grouped_gemm.triton(*operands.arguments, **operands.options))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", GEMM_FORMATS)
def test_fused_moe(format, shape):
    arguments, options = make_moe(format, shape)
    got = ops.fused_moe.triton(*arguments, **options).float()
    expected = ops.fused_moe.reference(*arguments, **options).float()
    # The first GEMM's inputs are the same bits; what differs is a rounding of gate_up, act and expert_out here and
    # there, and out's own: less than a unit in the mean, a few in the worst of all outputs.
    unit = {"bf16": 2**-8, "fp16": 2**-11, "fp8_block": 2**-4, "int8": 2**-7}[format]
    assert (got - expected).norm() <= unit * expected.norm()
    assert (got - expected).abs().max() <= 4 * unit * expected.abs().max()


@pytest.mark.parametrize("format, act_format", COMBINATIONS)
def test_fused_moe_in_every_combination(format, act_format):
    """The first GEMM's inputs have the reference's bits; a rounding of act or expert_out differs now and then."""
    fused_moe = importlib.import_module("torch_moe_ops.triton.fused_moe").fused_moe
    call = moe_cases.make_moe(
        format, act_format=act_format, num_tokens=99, hidden_size=720, intermediate_size=336, bias=True, device="cuda"
    )
    if act_format == "nvfp4":
        scale = torch.tensor([0.01, 0.002, 0.05, 0.03, 0.004], device="cuda")
        call = call.but(a13_global_scale=scale, a2_global_scale=scale[:1])
    got, expected = call(fused_moe).float(), call(reference_fused_moe).float()
    assert (got - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.parametrize("format", FORMATS)
def test_default_takes_every_format(format):
    """Weights as they are stored, activations in their format: a kernel for this GPU or Triton's."""
    call = moe_cases.make_moe(format, num_tokens=9, device="cuda")
    out = call(ops.fused_moe.default)
    if torch_moe_ops.explain("fused_moe", format=format).backend == "triton":
        assert torch.equal(out, call(ops.fused_moe.triton))


@pytest.mark.parametrize("format", FORMATS)
def test_a_tokens_output_does_not_depend_on_its_batch(format):
    """Batches of 1 to 2048 tokens use different tiles, and give each token the same bits."""
    (hidden_states, w13, w2, weights, ids), options = make_moe(format, "prefill")
    whole = ops.fused_moe.triton(hidden_states, w13, w2, weights, ids, **options)
    assert torch.equal(whole, ops.fused_moe.triton(hidden_states, w13, w2, weights, ids, **options))
    for rows in (slice(0, 1), slice(7, 10), slice(100, 300), slice(1000, 2048)):
        part = ops.fused_moe.triton(hidden_states[rows], w13, w2, weights[rows], ids[rows], **options)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("format", ["bf16", "fp8_block", "mxfp8", "nvfp4"])
def test_cuda_graph_replays_with_new_routing(format):
    (hidden_states, w13, w2, weights, ids), options = make_moe(format, "ragged")
    ops.fused_moe.triton(hidden_states, w13, w2, weights, ids, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.fused_moe.triton(hidden_states, w13, w2, weights, ids, **options)
    for new_ids in (ids.flip(0), torch.full_like(ids, 3), torch.full_like(ids, -1)):
        ids.copy_(new_ids)
        graph.replay()
        assert torch.equal(out, ops.fused_moe.triton(hidden_states, w13, w2, weights, ids, **options))


def test_compiles_without_graph_breaks():
    arguments, options = make_moe("fp8_block", "ragged")

    def layer(*arguments):
        return ops.fused_moe.triton(*arguments, **options) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(*arguments), layer(*arguments))
