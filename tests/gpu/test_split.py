"""cutlass_sm90 with few slots: GEMM1 finds and quantises its tokens by itself, GEMM2 reads gate_up once it is there.

Gated tiles, which read permuted tokens and wait for counters, are the yardstick: the same bits.
"""

from __future__ import annotations

import pytest
import torch
import tune
from gpu_layers import DEVICE, LAYER, W4A8, layer, needs_packing, product_of, split_tiles, with_ids, with_tactic
from moe_cases import Call

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MOST_SLOTS = tune.MAX_SPLIT_SLOTS
NUM_EXPERTS, TOP_K = LAYER["num_experts"], LAYER["top_k"]


def compare(call: Call) -> torch.Tensor:
    expected = with_tactic(call, "gated64")
    for tactic in split_tiles(product_of(call)):
        output = with_tactic(call, tactic)
        assert torch.equal(output.nan_to_num(), expected.nan_to_num()), tactic
        assert torch.equal(output.isnan(), expected.isnan()), tactic
    return expected


def routing(name: str, num_tokens: int) -> torch.Tensor:
    """[num_tokens, TOP_K]"""
    slots = torch.arange(num_tokens * TOP_K, device=DEVICE).view(num_tokens, TOP_K)
    expert = torch.arange(TOP_K, device=DEVICE).expand(num_tokens, TOP_K)
    return {
        "all to the same experts": expert,  # more than 32 tokens: several token tiles
        "the last experts": NUM_EXPERTS - 1 - expert,
        "one expert a slot": slots % NUM_EXPERTS,
        "absent": torch.where(slots % 3 == 0, -1, slots % NUM_EXPERTS),
        "one token alone is here": torch.where(slots // TOP_K == num_tokens - 1, expert, -1),
        "nobody is here": torch.full_like(slots, -1),
    }[name]


@pytest.mark.parametrize("num_tokens", [1, 2, 5, MOST_SLOTS // TOP_K])
@pytest.mark.parametrize(
    "name",
    [
        "all to the same experts",
        "the last experts",
        "one expert a slot",
        "absent",
        "one token alone is here",
        "nobody is here",
    ],
)
def test_routings(sm90_product: str, num_tokens: int, name: str) -> None:
    output = compare(with_ids(layer(sm90_product, num_tokens), routing(name, num_tokens)))
    assert output.isfinite().all()


def test_expert_map(sm90_product: str) -> None:
    """A third of the experts is here, in another order."""
    here = torch.arange(0, 3 * NUM_EXPERTS, 3, device=DEVICE).flip(0)
    expert_map = torch.full((3 * NUM_EXPERTS,), -1, dtype=torch.int32, device=DEVICE)
    expert_map[here] = torch.arange(NUM_EXPERTS, dtype=torch.int32, device=DEVICE)
    call = layer(sm90_product, 16)
    ids = torch.rand((16, 3 * NUM_EXPERTS), device=DEVICE).argsort(1)[:, :TOP_K]
    compare(with_ids(call, ids, expert_map=expert_map))


@pytest.mark.parametrize("sizes", [(1024, 512), (7168, 256), (256, 2048), (1040, 352)])
def test_sizes(sm90_product: str, sizes: tuple[int, int]) -> None:
    """Long and short K, and K that ends inside a block."""
    if sizes == (1040, 352) and needs_packing(sm90_product):
        pytest.skip("packed weights come in blocks of 64")
    compare(layer(sm90_product, 7, hidden_size=sizes[0], intermediate_size=sizes[1]))


def test_zeros_are_not_waited_for(sm90_product: str) -> None:
    """gate_up of a token of zeros is 0, as gate_up is before it is there; so is half of it, or all, for others."""
    call = layer(sm90_product, 6)
    x = call.args[0].clone()
    x[::2] = 0
    x[1, : x.shape[1] // 2] = 0
    output = compare(call.but(x))
    assert torch.equal(output[::2], torch.zeros_like(output[::2]))
    compare(call.but(torch.zeros_like(x)))


def test_nan_and_infinity(sm90_product: str) -> None:
    call = layer(sm90_product, 6)
    x = call.args[0].clone()
    x[0, 3], x[1, 5], x[2] = float("nan"), float("inf"), float("-inf")
    output = compare(call.but(x))
    assert output[3:].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "gelu"},
        {"activation": "gelu_tanh"},
        {"activation": "relu"},
        {"activation": "swiglustep", "limit": 7.0},
        {"alpha": 1.702, "beta": 1.0, "limit": 7.0, "bias": True},
        {"w13_layout": "up_gate"},
    ],
    ids=lambda options: options.get("activation", "alpha" if "alpha" in options else "up_gate"),
)
def test_activations(sm90_product: str, options: dict[str, object]) -> None:
    compare(layer(sm90_product, 9, **options))


def test_router_weight_on_input(sm90_product: str) -> None:
    compare(layer(sm90_product, 9, top_k=1, apply_router_weight_on_input=True))


def test_hidden_states_of_the_other_type(sm90_product: str) -> None:
    if sm90_product not in ("fp8_block", W4A8):
        pytest.skip("16-bit tokens are multiplied as they are")
    compare(layer(sm90_product, 9, dtype=torch.float16))


def test_one_slot_more_is_too_many(sm90_product: str) -> None:
    call = layer(sm90_product, MOST_SLOTS + 1, top_k=1)
    with pytest.raises(RuntimeError, match="fused_moe: tactic: expected one of gated[^\n]*, got split64$"):
        with_tactic(call, "split64")
    compare(layer(sm90_product, MOST_SLOTS, top_k=1))


def test_again_and_again_in_a_graph(sm90_product: str) -> None:
    """Two calls in turn use the same memory: what one left there may not be taken for the other's."""
    calls = [layer(sm90_product, num_tokens, seed=num_tokens) for num_tokens in (3, 8)]
    expected = [with_tactic(call, "gated64") for call in calls]
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(20):
            for call in calls:
                outputs.append(
                    call(lambda *args, **options: torch.ops.moe.fused_moe_with_tactic("split64", *args, **options))
                )
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for i, output in enumerate(outputs):
        assert torch.equal(output, expected[i % 2])


@pytest.mark.parametrize("others", ["a long kernel", "their like"])
def test_thread_blocks_that_start_late(sm90_product: str, others: str) -> None:
    """Some thread blocks start when others wait for their tiles: SMs are taken by another stream, by layers that end a
    thread block at a time, or by layers that wait in the same way."""
    call = layer(sm90_product, 1, hidden_size=2048, intermediate_size=1024, num_experts=64)
    other = layer(sm90_product, 1 if others == "their like" else 600, hidden_size=2048, intermediate_size=1024)
    tactics = split_tiles(product_of(call))
    expected = with_tactic(call, "gated64")
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    outputs = []
    for repeat in range(40):
        tactic = tactics[repeat % len(tactics)]
        with torch.cuda.stream(streams[0]):
            with_tactic(other, tactic if others == "their like" else "gated64")
        with torch.cuda.stream(streams[1]):
            outputs.append((tactic, with_tactic(call, tactic)))
    torch.cuda.synchronize()
    for tactic, output in outputs:
        assert torch.equal(output, expected), tactic
