"""cutlass_sm90 with many tokens: GEMM1 gathers its tokens (gathered128) instead of reading permuted ones (gated128).
The bits are the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gpu_layers import DEVICE, PACKED, layer, overload, why_not, with_ids, with_tactic
from moe_cases import Call

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FORMATS = ("bf16", "fp16", "fp8_block", *PACKED)


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    if reason := why_not("cutlass_sm90"):
        pytest.skip(f"cutlass_sm90: {reason}")
    return request.param


def gathered(call: Call) -> torch.Tensor:
    return call(partial(torch.ops.moe.fused_moe_with_tactic, "gathered128"))


def compare(call: Call) -> torch.Tensor:
    output = with_tactic(call, "gathered128")
    assert output.isfinite().all() and torch.equal(output, with_tactic(call, "gated128"))
    return output


# Wide tiles, and narrow ones of every size behind them.
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 1280, "top_k": 6}, {"num_experts": 40, "top_k": 9}])
@pytest.mark.parametrize("num_tokens", [600, 5000])
def test_the_same_bits_as_permuted_tokens(format: str, num_tokens: int, changes: dict[str, int]) -> None:
    compare(layer(format, num_tokens, **changes))


def test_tokens_that_cannot_be_gathered(format: str) -> None:
    """cp.async takes 16 bytes: the same numbers 8 bytes further are permuted by default."""
    call = layer(format, 5000)
    x = call.args[0]
    further = torch.empty(x.numel() + 4, dtype=x.dtype, device=x.device)[4:].view(x.shape).copy_(x)
    assert further.data_ptr() % 16 == 8 and further.is_contiguous()
    with pytest.raises(RuntimeError, match="^fused_moe: tactic: expected one of .*, got gathered128$"):
        gathered(call.but(further))
    assert torch.equal(call.but(further)(overload("cutlass_sm90")), compare(call))


def test_rows_that_end_inside_a_k_block(format: str) -> None:
    if format in PACKED:
        pytest.skip("packed weights come in blocks of 64")
    compare(layer(format, 1500, hidden_size=1040, intermediate_size=352))


def test_absent_slots_hot_and_empty_experts(format: str) -> None:
    call = layer(format, 3000)
    ids = call.args[4].clone()
    ids[:, 0] = 3  # one expert for every token
    ids[:, 1:4][ids[:, 1:4] < 32] = -1
    ids[1000:1100] = -1
    compare(with_ids(call, ids))
    expert_map = torch.full((64,), -1, dtype=torch.int32, device=DEVICE)
    expert_map[8:40] = torch.arange(32, dtype=torch.int32, device=DEVICE)
    x, w13, w2, *routing = call.args
    local = {
        name: value[:32] if isinstance(value, torch.Tensor) else value
        for name, value in call.options.items()
        if not (value is None and name.endswith("scale"))
    }
    out = compare(Call(x, w13[:32], w2[:32], *routing, **local, expert_map=expert_map))
    assert not out[(expert_map[routing[1].long()] < 0).all(1)].any()


def test_one_graph_for_changing_tokens_and_routing(format: str) -> None:
    call, other = layer(format, 1024), layer(format, 1024, seed=5)
    call = call.but(*(tensor.clone() for tensor in call.args))
    gathered(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = gathered(call)
    for source in (other, layer(format, 1024, seed=9)):
        x, w13, w2, topk_weights, topk_ids = source.args
        for buffer, tensor in zip((call.args[0], *call.args[3:]), (x, topk_weights, topk_ids), strict=True):
            buffer.copy_(tensor)
        graph.replay()
        assert torch.equal(output, with_tactic(call, "gated128"))
