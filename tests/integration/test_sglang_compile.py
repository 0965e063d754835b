"""The adapter's layer under torch.compile: one graph for any number of tokens, and the bits of the eager layer.

SGLang compiles whole models with --enable-torch-compile, and their experts with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from sglang_stand_ins import FORMATS, GPT_OSS, NVFP4, E, H, fp8_method, make_config, make_layer, make_method, quantise
from torch import Tensor, nn

from torch_moe_ops.integration.sglang.layer import LayerRunner


class TopKOutput(NamedTuple):
    """SGLang's records are tuples, too."""

    topk_weights: Tensor
    topk_ids: Tensor


class DispatchOutput(NamedTuple):
    hidden_states: Tensor
    topk_output: TopKOutput


class CombineInput(NamedTuple):
    hidden_states: Tensor


def loaded(method: object, layer: nn.Module, **changes: object) -> Callable[..., Tensor]:
    """A layer that was taken over and loaded -> its forward(hidden_states, topk_weights, topk_ids)."""
    LayerRunner(method, layer, make_config(**changes), None, CombineInput).take_over(method)
    method.process_weights_after_loading(layer)

    def forward(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        routed = DispatchOutput(hidden_states, TopKOutput(topk_weights, topk_ids))
        return method.apply(layer=layer, dispatch_output=routed).hidden_states

    return forward


def inputs(num_tokens: int, top_k: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(num_tokens)
    topk_ids = torch.rand(num_tokens, E, generator=random).argsort(1)[:, :top_k].int()
    topk_ids[1::3] = -1  # padding
    weights = torch.rand(num_tokens, top_k, generator=random)
    return torch.randn(num_tokens, H, generator=random).bfloat16(), weights, topk_ids


def expect_one_graph(forward: Callable[..., Tensor], top_k: int = 2) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for num_tokens in (7, 64, 12):
            args = inputs(num_tokens, top_k)
            assert torch.equal(compiled(*args), forward(*args))
        [nodes] = graphs  # no recompilation
        assert nodes.count(torch.ops.moe.fused_moe.default) == 1
        for num_tokens in (1, 0):  # torch compiles these sizes apart
            args = inputs(num_tokens, top_k)
            assert torch.equal(compiled(*args), forward(*args))


@pytest.mark.parametrize("format, method, names, act_format", FORMATS, ids=[case[0] for case in FORMATS])
def test_a_quantised_layer_is_one_graph(format, method, names, act_format) -> None:
    layer = make_layer()
    quantise(layer, format, **names)
    if method is NVFP4:
        layer.w13_input_scale, layer.w2_input_scale = torch.tensor([[0.01, 0.02]]), torch.tensor([0.04])
    expect_one_graph(loaded(method, layer))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"no_combine": True},
        {"apply_router_weight_on_input": True, "top_k": 1},
        {"routed_scaling_factor": 2.5},
        GPT_OSS,
        {"activation": "gelu"},
    ],
    ids=str,
)
def test_a_bf16_layer_is_one_graph(changes) -> None:
    layer = make_layer(bias=changes is GPT_OSS)
    expect_one_graph(loaded(make_method(), layer, **changes), changes.get("top_k", 2))


def test_fp8_with_a_scale_per_tensor_is_one_graph() -> None:
    layer = make_layer(torch.float8_e4m3fn)
    layer.w13_weight_scale, layer.w2_weight_scale = torch.rand(E, 2), torch.rand(E)
    expect_one_graph(loaded(fp8_method(weight_block_size=None), layer))
