"""Every GPU backend of fused_moe, and what callers rely on: errors, routing, determinism, graphs, compile, texts.

Two yardsticks. `dense_moe` is a float32 loop over experts of dequantised weights: it knows no rounding of activations,
so its distance is the whole error of a format. The reference overload rounds where the contract says, so a backend may
differ from it only where a float32 sum in another order lands next to a rounding boundary.
"""

from __future__ import annotations

import re

import pytest
import torch
from gpu_layers import (
    DEVICE,
    LAYER,
    MXFP4_MXFP8,
    PACKED,
    ROUNDED,
    W4A4,
    W4A8,
    formats_of,
    layer,
    needs_packing,
    overload,
    poison_free_memory,
    product_of,
    tokens,
    why_not,
    with_ids,
)
from moe_cases import Call, activate, make_moe
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_moe_ops as moe
from torch_moe_ops.activations import ACTIVATIONS
from torch_moe_ops.formats import FORMATS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BACKENDS = ("cutlass_sm90", "triton")
GPU_FORMATS = ("bf16", "fp16", "fp8_block")
# |got - dense| / |dense|. Three roundings of about the same size: gate_up's inputs or expert_out, act, output. The root
# mean square of one is 0.0017 (bf16), 0.0002 (fp16), 0.027 (fp8_block, activations); weights are not counted.
DENSE_ERROR = {"bf16": 6e-3, "fp16": 1e-3, "fp8_block": 5e-2, "nvfp4": 6e-3, "mxfp4": 6e-3, "mxfp8": 6e-3, W4A8: 5e-2}
DENSE_ERROR |= {W4A4: 0.2, MXFP4_MXFP8: 6e-2}  # docs/tuning.md has their errors
# |got - reference| / |reference|: one float8 step in a few activations out of a thousand, one unit of bf16 in a few
# outputs out of a hundred.
REFERENCE_ERROR = {
    "bf16": 4e-3,
    "fp16": 5e-4,
    "fp8_block": 5e-3,
    "nvfp4": 4e-3,
    "mxfp4": 4e-3,
    "mxfp8": 4e-3,
    W4A8: 5e-3,
    W4A4: 5e-3,
    MXFP4_MXFP8: 5e-3,
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if reason := why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(params=(*GPU_FORMATS, *PACKED, *ROUNDED, W4A8))
def format(request: pytest.FixtureRequest) -> str:
    if needs_packing(request.param) and "backend" in request.fixturenames:
        if (backend := request.getfixturevalue("backend")) != "cutlass_sm90":
            pytest.skip(f"{backend} takes no packed weights")
    return request.param


def local_ids(call: Call) -> Tensor:
    """topk_ids after expert_map, int64 [T, K]; -1 where the slot is absent."""
    ids, expert_map = call.args[4].long(), call.options.get("expert_map")
    return ids if expert_map is None else torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0)])


def dense_moe(call: Call) -> Tensor:
    """float32 [T, H]: nothing is rounded but the weights, which are what the checkpoint holds."""
    x, w13, w2, topk_weights, _ = call.args
    o, fmt, ids = call.options, FORMATS[call.options["format"]], local_ids(call)
    parts = 2 if ACTIVATIONS[o["activation"]].gated else 1
    numbers = [o.get("alpha", 1.0), o.get("beta", 0.0), o.get("limit")]
    on_input = o.get("apply_router_weight_on_input", False)
    out = torch.zeros(x.shape, device=x.device)

    def dense(name: str, weight: Tensor, e: int, parts: int) -> Tensor:
        values, scale, global_scale = weight[e], o[f"{name}_scale"], o.get(f"{name}_global_scale")
        if fmt.name in PACKED:
            values, scale = (x[0] for x in moe.unpack_weight(weight[e : e + 1], fmt.name))
        elif scale is not None:
            scale = scale[e]
        global_scale = global_scale if global_scale is None else global_scale[e]
        return fmt.dequantize(values, scale, fmt.weight_block, global_scale, parts)

    for e in ids.unique().tolist():
        token, k = (ids == e).nonzero(as_tuple=True)
        if e < 0 or not len(token):
            continue
        weight = topk_weights[token, k, None]
        a = x[token].float() * (weight if on_input else 1.0)
        gate_up = a @ dense("w13", w13, e, parts).T
        if o.get("w13_bias") is not None:
            gate_up += o["w13_bias"][e].float()
        y = activate(gate_up, o["activation"], o.get("w13_layout", "gate_up"), *numbers).float()
        expert_out = y @ dense("w2", w2, e, 1).T
        if o.get("w2_bias") is not None:
            expert_out += o["w2_bias"][e].float()
        out.index_add_(0, token, expert_out * (1.0 if on_input else weight))
    return out * o.get("routed_scaling_factor", 1.0)


def distance(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|; NaN, which no comparison passes, if anything is not finite."""
    if not expected.any():
        return 0.0 if not got.any() else float("inf")
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def reference_error(format: str, num_tokens: int) -> float:
    """A GEMM on float8 tensor cores is off by about 1.3e-4 of its root mean square.

    So one activation in several hundred falls on the other side of a rounding boundary, which moves it by a float8
    step, 1/16 to 1/8 of its value. On average that is 3.6e-3 of the output; with few tokens, a single step in a large
    activation weighs up to twice as much.
    """
    return REFERENCE_ERROR[format] * (2 if format in ("fp8_block", W4A8) and num_tokens < 64 else 1)


def compare(backend: str, call: Call, dense: bool = True) -> Tensor:
    """Runs the call and compares it with both yardsticks (fp8_block and `not dense`: with the reference alone)."""
    poison_free_memory()
    got, x, format = call(overload(backend)), call.args[0], product_of(call)
    assert (got.dtype, got.shape, got.device, got.is_contiguous()) == (x.dtype, x.shape, x.device, True)
    if dense:
        assert distance(got, dense_moe(call)) <= DENSE_ERROR[format]
    assert distance(got, call(overload("reference"))) <= reference_error(format, x.shape[0])
    return got


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64, 300, 2049])
def test_errors_of_each_format(backend: str, format: str, num_tokens: int) -> None:
    compare(backend, layer(format, num_tokens, routed_scaling_factor=2.5))


@pytest.mark.parametrize("hidden_size, intermediate_size", [(2880, 192), (1024, 352), (352, 704), (704, 2880)])
def test_sizes_that_no_tile_divides(format: str, hidden_size: int, intermediate_size: int) -> None:
    """cutlass_sm90 alone: each size is a compilation of Triton's kernels, whose own tests have ragged sizes."""
    if needs_packing(format) and (hidden_size % 64 or intermediate_size % 64):
        pytest.skip("packed weights come in blocks of 64")
    if reason := why_not("cutlass_sm90"):
        pytest.skip(reason)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": 8, "top_k": 2}
    for num_tokens in (7, 300):
        compare("cutlass_sm90", layer(format, num_tokens, **sizes))


GPT_OSS = {"alpha": 1.702, "beta": 1.0, "limit": 1.5, "bias": True}
OPTIONS = {
    "gate_up": GPT_OSS,
    "up_gate": {**GPT_OSS, "w13_layout": "up_gate"},
    "interleaved": {**GPT_OSS, "w13_layout": "interleaved"},
    "not gated": {"activation": "relu2_no_mul", "bias": True},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu", "w13_layout": "up_gate"},
    "swiglustep": {"activation": "swiglustep", "limit": 1.0},
    "weight on input": {"apply_router_weight_on_input": True, "top_k": 1},
}
# Each is a compilation of Triton's act_mul, which has tests of its own.
TRITON_OPTIONS = ("interleaved", "not gated", "weight on input")


@pytest.mark.parametrize("options", OPTIONS)
def test_biases_activations_and_layouts(backend: str, format: str, options: str) -> None:
    """The reference is the yardstick for fp8_block: some activations multiply the error of their inputs."""
    if backend == "triton" and (options not in TRITON_OPTIONS or format == "fp16"):
        pytest.skip("covered by tests/gpu/test_triton.py and tests/triton")
    for num_tokens in (7, 300):
        compare(backend, layer(format, num_tokens, **OPTIONS[options]), dense=format not in ("fp8_block", W4A8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_bias_types(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype != torch.bfloat16:
        pytest.skip("covered by tests/triton")
    call = layer("bf16", 64, bias=True)
    compare(backend, call.but(**{name: call.options[name].to(dtype) for name in ("w13_bias", "w2_bias")}))


# ---- routing ---------------------------------------------------------------------------------------------------------


def routings(call: Call) -> dict[str, Call]:
    ids = call.args[4]
    g = torch.Generator(DEVICE).manual_seed(1)
    absent = torch.rand(ids.shape, generator=g, device=DEVICE) < 0.3
    absent[len(ids) // 2] = True  # a token without any slot
    hot = torch.full_like(ids, -1)
    hot[:, 0] = 3
    elsewhere = torch.full((96,), -1, device=DEVICE)
    elsewhere[torch.randperm(96, generator=g, device=DEVICE)[:64]] = torch.randperm(64, generator=g, device=DEVICE)
    far_ids = torch.rand((len(ids), 96), generator=g, device=DEVICE).argsort(1)[:, : ids.shape[1]]
    return {
        "-1 ids": with_ids(call, torch.where(absent, -1, ids)),
        "nothing here": with_ids(call, torch.full_like(ids, -1)),
        "one hot expert": with_ids(call, hot),
        "the same expert in every slot": with_ids(call, torch.full_like(ids, 63)),
        "empty experts": with_ids(call, ids % 3 * 30),
        "expert_map": with_ids(call, torch.where(absent, -1, far_ids), expert_map=elsewhere.int()),
    }


@pytest.mark.parametrize("num_tokens", [7, 300])
def test_adversarial_routing(backend: str, format: str, num_tokens: int) -> None:
    for name, call in routings(layer(format, num_tokens)).items():
        # The errors of a handful of slots scatter around the mean of many, which is what DENSE_ERROR bounds.
        got = compare(backend, call, dense=num_tokens > 7 or format != "fp8_block")
        nowhere = (local_ids(call) < 0).all(1)
        assert not got[nowhere].any(), name


def test_ids_out_of_range_spoil_their_token_alone(backend: str, format: str) -> None:
    call = layer(format, 64)
    good, ids = call(overload(backend)), call.args[4].clone()
    ids[3, 1], ids[10, 7], ids[63, 0], ids[20] = 64, -2, 2**31 - 1, -(2**31)
    bad = torch.zeros(64, dtype=torch.bool, device=DEVICE)
    bad[[3, 10, 63, 20]] = True
    identity = torch.arange(64, device=DEVICE).int()
    for options in ({}, {"expert_map": identity}):
        poison_free_memory()
        got = with_ids(call, ids, **options)(overload(backend))
        assert got[bad].isnan().all()
        assert torch.equal(got[~bad], good[~bad])
    wrong_map = identity.clone()
    wrong_map[5], wrong_map[6] = 64, -2
    got = call(overload(backend), expert_map=wrong_map)
    hit = ((call.args[4] == 5) | (call.args[4] == 6)).any(1)
    assert hit.any() and got[hit].isnan().all() and torch.equal(got[~hit], good[~hit])


# ---- grouped_gemm.cutlass_sm90, exactly ------------------------------------------------------------------------------

OFFSETS = [3, 4, 4, 9, 80, 1005, 1006, 2504, 2993]  # multiples of nothing, from a row other than 0; an expert is empty
ROWS, N, K = 3001, 2 * 720, 2880


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("scales", ["k_major", "mn_major", "mn_major_padded"])
@pytest.mark.parametrize("product", GPU_FORMATS)
def test_grouped_gemm_with_any_offsets_and_scale_strides(
    product: str, scales: str, out_dtype: torch.dtype | None
) -> None:
    """Small integers and power-of-two scales: float32 sums are exact, so equality is asked for. Unused rows are NaN."""
    verdict = moe.explain("grouped_gemm", device=DEVICE, format=product, n=N, k=K, b_parts=2)
    reason = next(v.reason for v in verdict.verdicts if v.backend == "cutlass_sm90")
    if reason or (product != "fp8_block" and scales != "k_major"):
        pytest.skip(reason or "no scales")
    g = torch.Generator(DEVICE).manual_seed(2)
    fmt, first, used, experts = FORMATS[product], OFFSETS[0], OFFSETS[-1], len(OFFSETS) - 1

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g, device=DEVICE).float()

    a, b, options = integers(-2, 3, ROWS, K), integers(-2, 3, experts, N, K), {}
    if fmt.has_scale:
        a_scale = integers(-2, 3, *fmt.act_scale_shape(ROWS, K)).exp2()
        b_scale = integers(-2, 3, experts, *fmt.weight_scale_shape(N, K, 2)).exp2()
        a_scale[:first] = a_scale[used:] = float("nan")
        if scales != "k_major":
            padding = -ROWS % 4 if scales == "mn_major_padded" else 0
            a_scale = torch.nn.functional.pad(a_scale.T, (0, padding)).contiguous()[:, :ROWS].T
            b_scale = b_scale.mT.contiguous().mT
            assert a_scale.stride() == (1, ROWS + padding)
        options = {"a_scale": a_scale, "b_scale": b_scale, "b_parts": 2}
    a[:first] = a[used:] = float("nan")
    bias = integers(-8, 9, experts, N).to(torch.bfloat16)
    offsets = torch.tensor(OFFSETS, device=DEVICE).int()
    call = Call(a.to(fmt.dtype), b.to(fmt.dtype), offsets, bias=bias, format=product, out_dtype=out_dtype, **options)
    poison_free_memory()
    got, expected = call(torch.ops.moe.grouped_gemm.cutlass_sm90), call(torch.ops.moe.grouped_gemm.reference)
    assert got.dtype == expected.dtype == (out_dtype or (torch.float16 if product == "fp16" else torch.bfloat16))
    assert torch.equal(got[first:used], expected[first:used])


def packed_integers(g: torch.Generator, product: str, num_experts: int, n: int, k: int) -> Tensor:
    """Packed weights whose values are multiples of 0.5 and whose scales are powers of two."""

    def bytes_below(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=g, device=DEVICE, dtype=torch.uint8)

    fmt = FORMATS[product]
    exponents = bytes_below(4, num_experts, n, k // fmt.weight_block[1])
    scale = (exponents * 8 + 56 if product == "nvfp4" else exponents + 127).view(fmt.scale_dtype)
    if product == "mxfp8":
        values = ((bytes_below(25, num_experts, n, k).float() - 12) / 2).to(fmt.dtype)
    else:
        values = bytes_below(256, num_experts, n, k // 2)
    return moe.pack_weight(values, scale, product)


@pytest.mark.parametrize("rows", [[1, 0, 3, 130], [0, 8, 70, 17], [300, 300, 300, 300]])
@pytest.mark.parametrize("product", PACKED)
def test_grouped_gemm_of_packed_weights(product: str, rows: list[int]) -> None:
    """Small integers and scales that are powers of two: float32 sums are exact, so equality is asked for."""
    verdict = moe.explain("grouped_gemm", device=DEVICE, format=product, act_format="bf16", packed=True)
    if reason := next(v.reason for v in verdict.verdicts if v.backend == "cutlass_sm90"):
        pytest.skip(reason)
    g = torch.Generator(DEVICE).manual_seed(4)
    for n, k in ((2 * 64, 64), (2 * 704, 2880), (2 * 1024, 512)):
        b = packed_integers(g, product, 4, n, k)
        offsets = torch.tensor([0, *rows], device=DEVICE).cumsum(0).int()
        a = torch.randint(-2, 3, (sum(rows) + 5, k), generator=g, device=DEVICE).bfloat16()
        a[sum(rows) :] = float("nan")
        bias = torch.randint(-8, 9, (4, n), generator=g, device=DEVICE).bfloat16()
        options = {"format": product, "act_format": "bf16", "b_parts": 2, "out_dtype": torch.float32}
        if product == "nvfp4":
            options["b_global_scale"] = torch.tensor([[1.0, 0.5], [2.0, 4.0], [0.25, 1.0], [8.0, 2.0]], device=DEVICE)
        call = Call(a, b, offsets, bias=bias, **options)
        poison_free_memory()
        got, expected = call(torch.ops.moe.grouped_gemm.cutlass_sm90), call(torch.ops.moe.grouped_gemm.reference)
        assert torch.equal(got[: sum(rows)], expected[: sum(rows)]), (n, k)


# Experts and max_m for tiles of 64, 128 and 256 weight rows, the last of few and of many tokens.
@pytest.mark.parametrize("num_experts, max_m", [(8, 8), (8, 300), (256, 40), (64, 300)])
@pytest.mark.parametrize("product", ["bf16", "fp8_block", "nvfp4"])
def test_s0_5_masked_grouped_gemm_follows_masked_m(product: str, num_experts: int, max_m: int) -> None:
    """One graph, any masked_m; values outside [0, max_m] are clamped. Integers, so equality is asked for. Rows that are
    not in use are NaN, as are their scales, and nothing is written in their place."""
    if reason := why_not("cutlass_sm90"):
        pytest.skip(f"cutlass_sm90: {reason}")
    g, fmt = torch.Generator(DEVICE).manual_seed(5), FORMATS[product]
    n, k, shape = 2 * 704, 448, (num_experts, max_m)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=g, device=DEVICE).float()

    def random_rows() -> Tensor:
        return torch.randint(0, max_m + 1, (num_experts,), generator=g, device=DEVICE).int()

    x, x_scale, masked_m = integers(*shape, k), integers(*shape, -(-k // 128)).exp2(), random_rows()
    a, a_scale = x.flatten(0, 1).to(torch.bfloat16 if product in PACKED else fmt.dtype), x_scale.flatten(0, 1).clone()
    options = {"expert_rows": masked_m, "format": product, "b_parts": 2, "out_dtype": torch.float32}
    if product in PACKED:
        b, options["act_format"] = packed_integers(g, product, num_experts, n, k), "bf16"
    else:
        b = integers(num_experts, n, k).to(fmt.dtype)
    if product == "fp8_block":
        b_scale = integers(num_experts, *fmt.weight_scale_shape(n, k, 2)).exp2()
        options |= {"a_scale": a_scale, "b_scale": b_scale}
    call = Call(a, b, max_m * torch.arange(num_experts + 1, device=DEVICE).int(), **options)
    call(torch.ops.moe.grouped_gemm.cutlass_sm90)  # CUDA loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(torch.ops.moe.grouped_gemm.cutlass_sm90)
    everything, hot, outside = torch.full_like(masked_m, max_m), torch.zeros_like(masked_m), random_rows()
    hot[3], outside[:3] = max_m, torch.tensor([-5, max_m + 1, 2**31 - 1]).int()
    for rows in (random_rows(), everything, hot, hot * 0, outside):
        masked_m.copy_(rows)
        used = torch.arange(max_m, device=DEVICE) < rows[:, None]
        for buffer, values in ((a, x), (a_scale, x_scale)):
            buffer.copy_(values.masked_fill(~used[:, :, None], float("nan")).flatten(0, 1))
        out.fill_(-7777.0)
        graph.replay()
        expected, used = call(torch.ops.moe.grouped_gemm.reference), used.flatten()
        assert torch.equal(out[used], expected[used]) and (out[~used] == -7777.0).all()


# ---- bits ------------------------------------------------------------------------------------------------------------


def test_the_same_bits_in_every_run(backend: str, format: str) -> None:
    for num_tokens in (1, 300):
        call = layer(format, num_tokens)
        first = call(overload(backend))
        for _ in range(5):
            poison_free_memory()
            assert torch.equal(call(overload(backend)), first)


def test_a_token_depends_on_itself_alone(backend: str, format: str) -> None:
    """Batches of 1 to 300 tokens and shuffled ones take other tiles, and give each token the bits of the full batch."""
    call = layer(format, 2049)
    full = call(overload(backend))
    for num_tokens in range(1, 301, 23):
        assert torch.equal(tokens(call, slice(num_tokens))(overload(backend)), full[:num_tokens]), num_tokens
    for seed in range(2):
        order = torch.randperm(2049, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)
        assert torch.equal(tokens(call, order)(overload(backend)), full[order])
    x = call.args[0].clone()
    x[5] = float("nan")
    others = torch.arange(2049, device=DEVICE) != 5
    assert torch.equal(call.but(x)(overload(backend))[others], full[others])


# Split tiles up to 64 tokens, then gated ones of up to 64 tokens, from 385 on of up to 128, gathered.
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 64, 65, 300, 384, 385])
def test_every_tile_configuration_gives_the_same_bits(format: str, num_tokens: int) -> None:
    if reason := why_not("cutlass_sm90"):
        pytest.skip(f"cutlass_sm90: {reason}")
    call = layer(format, 2049, hidden_size=2048)
    everyone = call(overload("cutlass_sm90"))
    poison_free_memory()
    assert torch.equal(tokens(call, slice(num_tokens))(overload("cutlass_sm90")), everyone[:num_tokens])


@pytest.mark.parametrize("hidden_size", [1024, 2048])
@pytest.mark.parametrize("product", PACKED)
def test_two_thread_blocks_on_an_sm_give_the_same_bits(product: str, hidden_size: int) -> None:
    """Many tiles of few tokens: packed weights have configurations of their own for them."""
    if reason := why_not("cutlass_sm90"):
        pytest.skip(f"cutlass_sm90: {reason}")
    call = layer(product, 2049, hidden_size=hidden_size, intermediate_size=3072)
    everyone = call(overload("cutlass_sm90"))
    for num_tokens in (2, 8, 64, 90):
        poison_free_memory()
        assert torch.equal(tokens(call, slice(num_tokens))(overload("cutlass_sm90")), everyone[:num_tokens]), num_tokens


# Packed weights with a K of 4096: GEMM2 has a launch of its own up to 300 tokens; two thread blocks share an SM at 40,
# with tiles of 64 rows (1024 columns) or 128 (2304); at 4097, 2304 columns are tiles for one launch. The other formats
# take such a launch with a longer K or not at all; test_tactics.py has it for each.
@pytest.mark.parametrize("hidden_size", [1024, 2304])
def test_gemm2_in_a_launch_of_its_own_gives_the_same_bits(format: str, hidden_size: int) -> None:
    if reason := why_not("cutlass_sm90"):
        pytest.skip(f"cutlass_sm90: {reason}")
    call = layer(format, 4097, hidden_size=hidden_size, intermediate_size=4096, num_experts=8, top_k=2)
    everyone = call(overload("cutlass_sm90"))
    for num_tokens in (40, 300):
        poison_free_memory()
        assert torch.equal(tokens(call, slice(num_tokens))(overload("cutlass_sm90")), everyone[:num_tokens]), num_tokens


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 64, 2049])
def test_memory_is_what_workspace_bytes_says(backend: str, format: str, num_tokens: int) -> None:
    """Not counted there: the output, and scratch memory of a few KiB and a few bytes a slot."""
    call = layer(format, num_tokens)
    out = call(overload(backend))  # Triton compiles
    said = moe.workspace_bytes(num_tokens, **LAYER, **formats_of(format))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = call(overload(backend))
    taken = torch.cuda.max_memory_allocated() - before
    assert torch.equal(out, again)
    assert said / 8 < taken < said + again.nbytes + 32 * 1024 + 16 * num_tokens * LAYER["top_k"]


# ---- graphs and compile ----------------------------------------------------------------------------------------------


def test_cuda_graph_replays_other_inputs_and_routings(backend: str, format: str) -> None:
    call = layer(format, 64)
    x, w13, w2, topk_weights, ids = call.args
    inputs = [(x * s, topk_weights.roll(s, 0), other.args[4]) for s, other in enumerate(routings(call).values(), 1)
              if "expert_map" not in other.options]  # fmt: skip
    buffers = x.clone(), topk_weights.clone(), ids.clone()
    replayed = call.but(buffers[0], w13, w2, *buffers[1:])
    replayed(overload(backend))  # Triton compiles, CUDA loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = replayed(overload(backend))
    for tensors in inputs:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        assert torch.equal(out, replayed(overload(backend)))


@pytest.mark.parametrize("format", ["bf16", "fp8_block", "nvfp4"])
def test_one_compiled_graph_for_any_number_of_tokens(format: str) -> None:
    torch._dynamo.reset()
    call = layer(format, 300)
    counter = CompileCounterWithBackend("inductor")

    def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return moe.fused_moe(x * 2, *call.args[1:3], topk_weights, topk_ids, **call.options) + x

    compiled, compilations = torch.compile(run, backend=counter, fullgraph=True, dynamic=True), []
    for num_tokens in (300, 64, 7, 129):
        some = tokens(call, slice(num_tokens))
        arguments = [tensor.clone() for tensor in (some.args[0], *some.args[3:])]  # dynamo guards on views' bases
        assert torch.equal(compiled(*arguments), run(*arguments)), num_tokens
        compilations.append(counter.frame_count)
    # (dynamic=True tries float arguments as symbols first, which makes the first call compile twice.)
    assert compilations[0] <= 2 and compilations == compilations[:1] * 4


# ---- choice and refusals ---------------------------------------------------------------------------------------------


def test_default_is_what_explain_names(format: str) -> None:
    call = layer(format, 64)
    names = {name: LAYER[name] for name in ("hidden_size", "intermediate_size", "num_experts", "top_k")}
    chosen = moe.explain(
        "fused_moe", device=DEVICE, packed=needs_packing(format), **formats_of(format), **names
    ).backend
    assert torch.equal(call(moe.fused_moe), call(overload(chosen)))


def test_default_without_gradients() -> None:
    """Recorded or not: the same bits, and only a gradient that would be lost is refused."""
    for format, asked in (("fp8_block", False), ("int8", True)):  # the kernel of SM90, and Triton, whom Python finds
        call = make_moe(format, num_tokens=3, device=DEVICE)
        expected = call(overload("default"))
        grown = call.but(call.args[0].clone().requires_grad_())
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                    assert torch.equal(call(overload("default")), expected)
                if not why_not("cutlass_sm90"):
                    assert any(event.name == "moe::choose_fused_moe" for event in profile.events()) is asked
                assert torch.equal(grown(overload("default")), expected)
        assert message(overload("default"), grown).startswith("fused_moe: hidden_states: expected no grad, got ")


def bad_calls(call: Call) -> dict[str, Call]:
    x, w13, w2, topk_weights, ids = call.args
    scale = call.options["w13_scale"]
    return {
        "hidden_states": call.but(x.float()),
        "hidden_states transposed": call.but(x.T.contiguous().T),
        "hidden_states and w13": call.but(x[:, :128].contiguous()),
        "w13": call.but(x, w13[:, :100].contiguous()),
        "w2": call.but(x, w13, w2[:1].contiguous()),
        "w2 transposed": call.but(x, w13, w2.mT),
        "no experts": call.but(x, w13[:0], w2[:0], **{s: call.options[s][:0] for s in ("w13_scale", "w2_scale")}),
        "topk_weights": call.but(x, w13, w2, topk_weights.half()),
        "topk_weights, tokens": call.but(x, w13, w2, topk_weights[:2].contiguous()),
        "topk_ids": call.but(*call.args[:4], ids.long()),
        "topk_ids, tokens": call.but(*call.args[:4], ids[:2].contiguous()),
        "no scale": call.but(w13_scale=None),
        "scale of another shape": call.but(w13_scale=scale[:, :, :1]),
        "scale of another dtype": call.but(w13_scale=scale.half()),
        "global scale": call.but(w13_global_scale=torch.ones(len(w13), device=x.device)),
        "bias": call.but(w2_bias=torch.ones(len(w13), 5, device=x.device)),
        "expert_map": call.but(expert_map=ids),
        "another device": call.but(expert_map=torch.zeros(8, dtype=torch.int32)),
        "format": call.but(format="fp4"),
        "act_format": call.but(act_format="fp16"),
        "activation": call.but(activation="swish"),
        "alpha": call.but(activation="gelu", alpha=2.0),
        "limit": call.but(activation="relu", limit=1.0),
        "no limit": call.but(activation="swiglustep"),
        "layout": call.but(w13_layout="rows"),
        "weight on input": call.but(apply_router_weight_on_input=True),
        "grad": call.but(x.clone().requires_grad_()),
    }


def message(op: torch._ops.OpOverload, call: Call) -> str:
    with pytest.raises(RuntimeError) as caught:
        call(op)
    return str(caught.value)


def as_fake(mode: FakeTensorMode, call: Call) -> Call:
    def fake(value: object) -> object:
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    return Call(*map(fake, call.args), **{name: fake(value) for name, value in call.options.items()})


def test_refusals_read_the_same_everywhere() -> None:
    """From the op, from each backend by name, and from their fakes on fake CUDA tensors and on meta tensors."""
    good = make_moe("fp8_block", num_tokens=3, device=DEVICE)
    names = ["default", "reference", *(name for name in BACKENDS if not why_not(name))]
    good(moe.fused_moe)
    for what, call in bad_calls(good).items():
        line = message(overload("default"), call)
        assert re.fullmatch(r"fused_moe: \w+: expected .+, got .+", line), what
        if what != "grad":
            with torch.no_grad():
                assert message(overload("default"), call) == line, what
        for name in names:
            assert message(overload(name), call) == line, what
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert message(overload(name), as_fake(mode, call)) == line, what
            if what not in ("another device", "grad"):  # "meta" has one device only, and moving detaches
                assert message(overload(name), call.to("meta")) == re.sub(r"\bcuda:\d+\b", "meta", line), what
