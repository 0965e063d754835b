"""cutlass_sm90 gives the same bits with every tactic that moe::fused_moe_with_tactic (for benchmarks/tune.py) takes."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from gpu_layers import (
    BF16_LAYOUT,
    DEVICE,
    LAYER,
    ROUNDED,
    W4A8,
    layer,
    overload,
    possible_tactics,
    possible_tiles,
    with_ids,
    with_tactic,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Rows an expert has: on both sides of where tiles change their kind (narrow, half-wide, wide, tall), and more than one.
ROWS = (0, 1, 16, 17, 32, 33, 48, 49, 64, 65, 100, 127, 128, 129, 136, 144, 145, 161, 192, 193, 256, 257, 288, 289, 401)


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 1.702, "beta": 1.0, "limit": 1.5, "bias": True, "w13_layout": "up_gate"}, {"activation": "gelu"}],
    ids=["silu", "limit and bias", "gelu"],
)
def test_tiles_of_every_height(sm90_product: str, options: dict[str, object]) -> None:
    """Of sizes that no tile divides; "gated64" has none but narrow tiles."""
    sizes = {"hidden_size": 704, "intermediate_size": 320, "num_experts": len(ROWS), "top_k": 1}
    call = layer(sm90_product, sum(ROWS), **sizes, **options)
    ids = torch.arange(len(ROWS), device=DEVICE).repeat_interleave(torch.tensor(ROWS, device=DEVICE))
    order = torch.randperm(sum(ROWS), generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    call = with_ids(call, ids[order, None])
    expected = with_tactic(call, "gated64")
    assert expected.isfinite().all()
    for tactic in possible_tactics(sm90_product, split=False):
        assert torch.equal(with_tactic(call, tactic), expected), tactic


def test_short_tiles_that_are_drawn_together(sm90_product: str) -> None:
    """GEMM2 has 4096 tiles of two to four stages if every expert is hit; split tiles are drawn in another way."""
    call = layer(sm90_product, 40, hidden_size=8192, intermediate_size=256, num_experts=128)
    expected = with_tactic(call, "split64")
    assert expected.isfinite().all()
    for tactic in ("gated64", "gated32") if sm90_product in BF16_LAYOUT else ("gated64",):
        assert torch.equal(with_tactic(call, tactic), expected), tactic


@pytest.mark.parametrize("hidden_size", [256, 8192])
def test_tiles_of_one_stage(sm90_product: str, hidden_size: int) -> None:
    """GEMM2's K is one stage of the pipeline, and GEMM1's may be fewer than there are: what tells GEMM2 that act is
    complete may not wait for tiles of GEMM2, of which a thread block has more than there are slots for tiles."""
    call = layer(sm90_product, 500, hidden_size=hidden_size, intermediate_size=64, num_experts=64, top_k=4)
    expected = with_tactic(call, "gated64")
    assert expected.isfinite().all()
    for tactic in possible_tactics(sm90_product, split=False):
        for _ in range(20):
            assert torch.equal(with_tactic(call, tactic), expected), tactic


@pytest.mark.parametrize("num_tokens", [7, 300])
def test_experts_far_apart(sm90_product: str, num_tokens: int) -> None:
    """A tile is looked for among 32 experts at once, and then farther away: of 1024, seven are hit. A layer of those
    seven alone gives the same bits."""
    call = layer(sm90_product, num_tokens, hidden_size=256, intermediate_size=128, num_experts=1024, top_k=2)
    hit, first = torch.tensor([0, 1, 31, 500, 991, 992, 1023], device=DEVICE), torch.arange(num_tokens, device=DEVICE)
    ids = torch.stack((first, first + 3), 1) % len(hit)
    of_each_expert = {
        name: x[hit] for name, x in call.options.items() if isinstance(x, torch.Tensor) and x.shape[:1] == (1024,)
    }
    x, w13, w2, weights, _ = call.args
    expected = with_tactic(call.but(x, w13[hit], w2[hit], weights, ids.int(), **of_each_expert), "gated64")
    assert expected.isfinite().all()
    for tactic in possible_tactics(sm90_product, split=num_tokens < 192):
        assert torch.equal(with_tactic(with_ids(call, hit[ids]), tactic), expected), tactic


@pytest.mark.parametrize("num_tokens", [1, 33, 700])
def test_the_same_bits(sm90_product: str, num_tokens: int) -> None:
    call = layer(sm90_product, num_tokens)
    expected = call(overload("cutlass_sm90"))
    for tactic in ("", *possible_tactics(sm90_product, split=num_tokens < 700)):  # more are too many slots
        assert torch.equal(with_tactic(call, tactic), expected), tactic


@pytest.mark.parametrize("num_tokens", [3, 70, 256])
def test_small_layers(sm90_product: str, num_tokens: int) -> None:
    """Small enough for compute-sanitizer, with a K by which every stage of the pipeline is used again."""
    call = layer(sm90_product, num_tokens, hidden_size=1536, intermediate_size=512, num_experts=4, top_k=2)
    expected = with_tactic(call, "gated64")
    assert expected.isfinite().all()
    for tactic in possible_tactics(sm90_product, split=num_tokens < 192):
        assert torch.equal(with_tactic(call, tactic), expected), tactic


def test_many_calls_give_the_same_bits(sm90_product: str) -> None:
    """GEMM2's K is long, and loading its tokens keeps the memory pipeline busy: what refills a stage may not overtake
    loads from shared memory that this holds up."""
    call = layer(sm90_product, 8, hidden_size=5120, intermediate_size=12288, num_experts=6, top_k=3)
    expected = with_tactic(call, "gated64")
    for tactic in possible_tactics(sm90_product):
        outputs = [with_tactic(call, tactic)]
        outputs += [call(partial(torch.ops.moe.fused_moe_with_tactic, tactic)) for _ in range(400)]
        different = sum(not torch.equal(output, expected) for output in outputs)
        assert different == 0, f"{tactic}: {different} of {len(outputs)}"


@pytest.mark.parametrize("num_tokens", [1, 6, 48, 320])
def test_routing_of_the_kernel_before(sm90_product: str, num_tokens: int) -> None:
    """Tiles are found while the kernels before run, and split ones look for gate_up while it is written: nothing of the
    calls before, which had the same memory for other routings, may be taken for this one's."""
    call = layer(sm90_product, num_tokens)
    logits = torch.randn(3, num_tokens, LAYER["num_experts"], device=DEVICE)

    def run(tactic: str, index: int, wait: bool) -> torch.Tensor:
        topk_weights, topk_ids = torch.ops.moe.topk(logits[index], LAYER["top_k"])
        if wait:
            torch.cuda.synchronize()
        routed = call.but(*call.args[:3], topk_weights, topk_ids)
        return routed(partial(torch.ops.moe.fused_moe_with_tactic, tactic))

    for tactic in possible_tactics(sm90_product, split=num_tokens <= 48):
        expected = [run(tactic, index, wait=True) for index in range(3)]
        graph, outputs = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            for _ in range(10):
                outputs += [run(tactic, index, wait=False) for index in range(3)]
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        different = sum(not torch.equal(output, expected[i % 3]) for i, output in enumerate(outputs))
        assert different == 0, f"{tactic}: {different} of {len(outputs)}"


@pytest.mark.parametrize("num_tokens", [1, 6, 320])
def test_expert_map_without_elements(sm90_product: str, num_tokens: int) -> None:
    """No id is in range; it is not the same as no map."""
    call = layer(sm90_product, num_tokens).but(expert_map=torch.empty(0, dtype=torch.int32, device=DEVICE))
    ids = call.args[4].clone()
    ids[num_tokens // 2] = -1
    for tactic in possible_tactics(sm90_product, split=num_tokens < 320):
        output = with_tactic(with_ids(call, ids), tactic)
        assert not output[num_tokens // 2].any(), tactic
        output[num_tokens // 2] = torch.nan
        assert output.isnan().all(), tactic


@pytest.mark.parametrize("tactic", ["split64+gemm2", "gated256", "gated32"])
def test_impossible_tactics_are_refused(sm90_product: str, tactic: str) -> None:
    if tactic == "gated32" and sm90_product in BF16_LAYOUT:
        return
    names = possible_tiles(sm90_product)
    possible = ", ".join(names[: names.index("gated64")])
    last = "gated64" if sm90_product in (W4A8, *ROUNDED) else "gathered128"
    message = rf"fused_moe: tactic: expected one of {possible},[^\n]*{last}\+gemm2, got {re.escape(tactic)}$"
    with pytest.raises(RuntimeError, match=message):
        with_tactic(layer(sm90_product, 8), tactic)
