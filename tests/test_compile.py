"""torch.compile, torch.export and AOTInductor: one graph, any number of tokens, the same bits as eager."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moe_cases import Call, make_moe
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS

TOKENS = (7, 64, 300, 1, 0)
STEPS = ("bf16", "fp8_block", "nvfp4")


class Stages(torch.nn.Module):
    """fused_moe as a chain of ops, the router in front."""

    def __init__(self, call: Call, alignment: int = 1) -> None:
        super().__init__()
        _, self.w13, self.w2 = call.args[:3]
        self.options, self.alignment = call.options, alignment

    def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
        o = self.options
        format = o["format"]
        topk_weights, topk_ids = moe.topk(router_logits, 2)
        offsets, slot_to_row, row_to_slot = moe.sort_slots(topk_ids, self.w13.shape[0], alignment=self.alignment)
        a, a_scale = moe.permute(x, slot_to_row, row_to_slot.shape[0], format=format)
        w13 = {"b_scale": o["w13_scale"], "b_global_scale": o["w13_global_scale"], "b_parts": 2}
        gate_up = moe.grouped_gemm(a, self.w13, offsets, a_scale=a_scale, format=format, out_dtype=torch.float32, **w13)
        act, act_scale = moe.act_mul(gate_up, offsets, format=format)
        w2 = {"b_scale": o["w2_scale"], "b_global_scale": o["w2_global_scale"]}
        out = moe.grouped_gemm(act, self.w2, offsets, a_scale=act_scale, format=format, **w2)
        return moe.finalize(out, slot_to_row, topk_weights=topk_weights) * 2


class Masked(torch.nn.Module):
    """The layer in the masked form: x [E, max_m, H], of which expert e uses masked_m[e] rows."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        _, self.w13, self.w2 = call.args[:3]
        self.options = call.options

    def forward(self, x: Tensor, masked_m: Tensor) -> Tensor:
        o, num_experts, max_m = self.options, *x.shape[:2]
        format = o["format"]
        offsets = max_m * torch.arange(num_experts + 1, dtype=torch.int32)
        rows = {"expert_offsets": offsets, "expert_rows": masked_m, "format": format}
        a, a_scale = moe.quantize(x.flatten(0, 1), format)
        w13 = {"b_scale": o["w13_scale"], "b_global_scale": o["w13_global_scale"], "b_parts": 2}
        gate_up = moe.grouped_gemm(a, self.w13, **rows, a_scale=a_scale, out_dtype=torch.float32, **w13)
        act, act_scale = moe.act_mul(gate_up, offsets, format=format)
        w2 = {"b_scale": o["w2_scale"], "b_global_scale": o["w2_global_scale"]}
        out = moe.grouped_gemm(act, self.w2, **rows, a_scale=act_scale, **w2)
        return out.view(num_experts, max_m, -1) * 2


class Fused(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        _, self.w13, self.w2 = call.args[:3]
        self.options = call.options

    def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
        topk_weights, topk_ids = moe.topk(router_logits, 2)
        return moe.fused_moe(x, self.w13, self.w2, topk_weights, topk_ids, **self.options) * 2


def inputs(num_tokens: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(num_tokens)
    return torch.randn(num_tokens, 160).bfloat16(), torch.randn(num_tokens, 5)


def module(kind: str, format: str) -> torch.nn.Module:
    call = make_moe(format, num_tokens=0)
    return Fused(call) if kind == "fused" else Stages(call, alignment=8 if kind == "aligned stages" else 1)


@pytest.mark.parametrize("format", STEPS)
@pytest.mark.parametrize("kind", ["fused", "stages", "aligned stages"])
def test_one_graph_for_any_number_of_tokens(kind: str, format: str) -> None:
    """Sizes 0 and 1 are the ones PyTorch itself specialises; with that off, nothing here specialises any size."""
    torch._dynamo.reset()
    compilations = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]):  # noqa: ANN202
        compilations.append(graph)
        return torch._inductor.compile(graph, example_inputs)

    eager = module(kind, format)
    compiled = torch.compile(eager, backend=backend, fullgraph=True, dynamic=True)
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        for num_tokens in TOKENS:
            x, logits = inputs(num_tokens)
            assert torch.equal(compiled(x, logits), eager(x, logits)), num_tokens
    assert len(compilations) <= 2


@pytest.mark.parametrize("format", STEPS)
def test_one_graph_for_any_masked_form(format: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    eager = Masked(make_moe(format, num_tokens=0))
    compiled, compilations = torch.compile(eager, backend=counter, fullgraph=True, dynamic=True), []
    for max_m in (7, 64, 3):
        x, masked_m = torch.randn(5, max_m, 160).bfloat16(), torch.tensor([0, max_m, 1, 3, 2]).int()
        x[2, 1:] = float("nan")
        used = torch.arange(max_m) < masked_m[:, None]
        got = compiled(x, masked_m)[used]
        assert got.isfinite().all() and torch.equal(got, eager(x, masked_m)[used]), max_m
        compilations.append(counter.frame_count)
    # (dynamic=True tries float arguments as symbols first, which makes the first call compile twice.)
    assert compilations[0] <= 2 and compilations == compilations[:1] * 3


def test_by_default_only_sizes_0_and_1_compile_again() -> None:
    torch._dynamo.reset()
    compilations = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]):  # noqa: ANN202
        compilations.append(graph)
        return graph

    eager = module("fused", "bf16")
    compiled = torch.compile(eager, backend=backend, fullgraph=True, dynamic=True)
    for num_tokens in (64, 7, 300, 1, 2049, 0, 33):
        x, logits = inputs(num_tokens)
        assert torch.equal(compiled(x, logits), eager(x, logits)), num_tokens
    assert len(compilations) <= 3


@pytest.mark.parametrize("format", STEPS)
@pytest.mark.parametrize("kind", ["fused", "stages"])
def test_export_round_trip(kind: str, format: str, tmp_path: Path) -> None:
    eager = module(kind, format)
    tokens = {0: torch.export.Dim("tokens", min=0, max=4096)}
    exported = torch.export.export(eager, inputs(7), dynamic_shapes=(tokens, tokens))
    torch.export.save(exported, tmp_path / "moe.pt2")
    loaded = torch.export.load(tmp_path / "moe.pt2").module()
    for num_tokens in (7, 64, 2):
        assert torch.equal(loaded(*inputs(num_tokens)), eager(*inputs(num_tokens)))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "moe.fused_moe.default" in names or "moe.grouped_gemm.default" in names


@pytest.mark.parametrize("kind", ["fused", "stages"])
def test_aot_inductor(kind: str, tmp_path: Path) -> None:
    eager = module(kind, "fp8_block")
    tokens = {0: torch.export.Dim("tokens", min=2, max=4096)}
    exported = torch.export.export(eager, inputs(7), dynamic_shapes=(tokens, tokens))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "moe.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for num_tokens in (7, 64):
        assert torch.equal(compiled(*inputs(num_tokens)), eager(*inputs(num_tokens)))


def test_strided_scales_reach_the_gemm_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor may not lay out arguments anew: a scale computed in the graph arrives with its strides."""
    from torch_moe_ops.reference import grouped_gemm as reference

    fmt = FORMATS["fp8_block"]
    a, a_scale = fmt.quantize(torch.randn(8, 256), fmt.act_block)
    b, b_scale = fmt.quantize(torch.randn(1, 16, 256), fmt.weight_block)
    seen, same_bits = [], reference.same_bits

    def spy(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if tensor is not None and tensor.shape == a_scale.shape:
            seen.append(tensor.stride())
        return same_bits(tensor, dtype)

    def run(scale: Tensor) -> Tensor:
        return moe.grouped_gemm(
            a, b, torch.tensor([0, 8]).int(), a_scale=scale * 2.0, b_scale=b_scale, format="fp8_block"
        )

    monkeypatch.setattr(reference, "same_bits", spy)
    mn_major = a_scale.mT.contiguous().mT
    assert torch.equal(torch.compile(run, fullgraph=True)(mn_major), run(mn_major))
    assert seen == [(1, 8), (1, 8)]
