"""The SGLang adapter: its translation of SGLang's objects (without SGLang), and its place in an installed SGLang."""

from __future__ import annotations

import enum
import importlib.util
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import torch_moe_ops as moe
from torch_moe_ops.formats import quantize_weight
from torch_moe_ops.integration.sglang import check, hooks, support
from torch_moe_ops.integration.sglang.__main__ import main as adapter_main
from torch_moe_ops.integration.sglang.layer import LayerRunner

ROOT = Path(__file__).resolve().parents[2]
T, E, K, H, I = 9, 6, 2, 256, 128  # noqa: E741

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed")


# stand-ins for SGLang's objects ---------------------------------------------------------------------------------------


def make_config(**changes: object) -> SimpleNamespace:
    """MoeRunnerConfig with the defaults of SGLang."""
    defaults = {
        "top_k": K,
        "activation": "silu",
        "is_gated": True,
        "apply_router_weight_on_input": False,
        "no_combine": False,
        "routed_scaling_factor": None,
        "gemm1_alpha": None,
        "gemm1_beta": None,
        "gemm1_clamp_limit": None,
        "swiglu_limit": None,
        "gate_up_interleaved": True,
    }
    assert changes.keys() <= defaults.keys()
    return SimpleNamespace(**defaults | changes)


def make_method(name: str = support.UNQUANTISED, **attributes: object) -> object:
    method = type(name, (), {})()
    vars(method).update(attributes)
    return method


def fp8_method(**changes: object) -> object:
    attributes = {"use_mxfp8": False, "is_fp4_expert": False, "weight_block_size": [128, 128]}
    return make_method(support.FP8, **attributes | changes)


def make_layer(dtype: torch.dtype = torch.bfloat16, *, parts: int = 2, bias: bool = False) -> SimpleNamespace:
    random = torch.Generator().manual_seed(0)
    w13 = torch.randn(E, parts * I, H, generator=random) * 2 / H**0.5
    w2 = torch.randn(E, H, I, generator=random) / I**0.5
    layer = SimpleNamespace(w13_weight=w13.to(dtype), w2_weight=w2.to(dtype))
    if bias:
        layer.w13_weight_bias = torch.randn(E, parts * I, generator=random)
        layer.w2_weight_bias = torch.randn(E, H, generator=random)
    layer.should_fuse_routed_scaling_factor_in_topk = False
    return layer


def make_dispatched(dtype: torch.dtype = torch.bfloat16, top_k: int = K) -> SimpleNamespace:
    random = torch.Generator().manual_seed(1)
    topk_output = SimpleNamespace(
        topk_weights=torch.rand(T, top_k, generator=random) + 0.1,
        topk_ids=torch.rand(T, E, generator=random).argsort(1)[:, :top_k].int(),
    )
    hidden_states = torch.randn(T, H, generator=random).to(dtype)
    return SimpleNamespace(hidden_states=hidden_states, topk_output=topk_output)


def run(method: object, layer: SimpleNamespace, config: SimpleNamespace, dispatched: SimpleNamespace) -> Tensor:
    """What FusedMoE does with a method that was taken over: load, then one forward."""
    LayerRunner(method, layer, config, SimpleNamespace(value=support.NAME), SimpleNamespace).take_over(method)
    method.process_weights_after_loading(layer)
    return method.apply(layer=layer, dispatch_output=dispatched).hidden_states


def expect_close(layer, dispatched, activation, actual, *, on_input: bool = False) -> None:
    """The sum over k in float64, from the definition.

    S = sum over k of w_k * (|w2| |y| + |bias|) bounds every partial sum. y, an expert's output and the output are
    rounded to bf16, each with a relative error of at most 2^-8 / 2; float32 sums of at most 256 terms add far less.
    """
    weights, ids = dispatched.topk_output.topk_weights.double(), dispatched.topk_output.topk_ids
    w13, w2 = layer.w13_weight.double(), layer.w2_weight.double()
    b13 = getattr(layer, "w13_weight_bias", torch.zeros(w13.shape[:2])).double()
    b2 = getattr(layer, "w2_weight_bias", torch.zeros(w2.shape[:2])).double()
    expected, bound = torch.zeros(T, H).double(), torch.zeros(T, H).double()
    for t, k in torch.cartesian_prod(torch.arange(T), torch.arange(ids.shape[1])).tolist():
        if (e := ids[t, k]) < 0:
            continue
        x = dispatched.hidden_states[t].double()
        if on_input:
            x = (x * weights[t, k]).to(torch.bfloat16).double()
        y = activation(w13[e] @ x + b13[e])
        weight = 1.0 if on_input else weights[t, k]
        expected[t] += weight * (w2[e] @ y + b2[e])
        bound[t] += weight * (w2[e].abs() @ y.abs() + b2[e].abs())
    error = (actual.double() - expected).abs()
    assert (error <= 3 * 2**-9 * bound * 1.01 + 1e-6).all(), (error / bound).max()


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2)
    return F.silu(gate) * up


# formats --------------------------------------------------------------------------------------------------------------


def test_formats_of_supported_methods() -> None:
    assert support.weight_format(make_method(), make_layer()) == "bf16"
    assert support.weight_format(make_method(), make_layer(torch.float16)) == "fp16"
    layer = make_layer(torch.float8_e4m3fn)
    layer.w13_weight_scale_inv = torch.ones(E, 2, 2)
    assert support.weight_format(fp8_method(), layer) == "fp8_block"


@pytest.mark.parametrize(
    "method, got",
    [
        (make_method("W8A8Int8MoEMethod"), "experts under W8A8Int8MoEMethod"),
        (make_method("Mxfp4MoEMethod"), "experts under Mxfp4MoEMethod"),
        (make_method(), "unquantised experts in torch.float32"),
        (fp8_method(use_mxfp8=True, weight_block_size=[1, 32]), "mxfp8 experts"),
        (fp8_method(is_fp4_expert=True), "FP4 experts in an FP8 checkpoint"),
        (fp8_method(weight_block_size=None), "FP8 experts with a scale per tensor"),
        (fp8_method(weight_block_size=[64, 128]), "FP8 experts with blocks of [64, 128]"),
    ],
)
def test_other_methods_are_refused_in_one_sentence(method: object, got: str) -> None:
    with pytest.raises(support.Unsupported) as caught:
        support.weight_format(method, make_layer(torch.float32))
    assert str(caught.value) == f"--moe-runner-backend torch_moe: expected {support.SUPPORTED}, got {got}"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "situ"},
        {"activation": "silu_rounded"},
        {"activation": "relu2"},
        {"activation": "gelu", "gemm1_alpha": 1.702},
        {"activation": "gelu", "is_gated": False, "gemm1_clamp_limit": 7.0},
        {"gemm1_beta": 1.0},
    ],
)
def test_other_activations_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(support.Unsupported):
        support.activation_options(make_config(**changes))


def test_other_uses_of_the_router_weights_are_refused() -> None:
    with pytest.raises(support.Unsupported, match="no_combine"):
        support.router_weight_options(make_config(no_combine=True))
    with pytest.raises(support.Unsupported, match="with top_k 2"):
        support.router_weight_options(make_config(apply_router_weight_on_input=True))


# one layer ------------------------------------------------------------------------------------------------------------


def clamped_oai(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS = [
    ({}, silu_mul),
    ({"activation": "gelu"}, lambda x: F.gelu(x[:I]) * x[I:]),
    ({"activation": "gelu_tanh"}, lambda x: F.gelu(x[:I], approximate="tanh") * x[I:]),
    ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 0.7}, lambda x: clamped_oai(x[0::2], x[1::2])),
    (
        {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 0.7, "gate_up_interleaved": False},
        lambda x: clamped_oai(x[:I], x[I:]),
    ),
    ({"gemm1_clamp_limit": 0.5}, lambda x: F.silu(x[:I]).clamp(max=0.5) * x[I:].clamp(-0.5, 0.5)),
    ({"swiglu_limit": 0.5}, lambda x: F.silu(x[:I].clamp(max=0.5)) * x[I:].clamp(-0.5, 0.5)),
    ({"activation": "relu2", "is_gated": False}, lambda x: F.relu(x).square()),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("changes, activation", ACTIVATIONS, ids=lambda value: str(value) if value != {} else "silu")
def test_a_layer_computes_what_sglang_defines(changes, activation, bias) -> None:
    config = make_config(**changes)
    layer, dispatched = make_layer(parts=2 if config.is_gated else 1, bias=bias), make_dispatched()
    expect_close(layer, dispatched, activation, run(make_method(), layer, config, dispatched))


def test_experts_of_other_ranks_are_left_out() -> None:
    layer, dispatched = make_layer(), make_dispatched()
    ids = dispatched.topk_output.topk_ids
    ids[ids >= E // 2] = -1
    ids[0] = -1
    output = run(make_method(), layer, make_config(), dispatched)
    expect_close(layer, dispatched, silu_mul, output)
    assert not output[0].any()


def test_tensor_parallel_ranks_add_up() -> None:
    """Each rank has half of the intermediate columns, gate and up alike; the ranks' outputs are summed."""
    layer, dispatched, total = make_layer(), make_dispatched(), 0
    gate, up = layer.w13_weight.chunk(2, dim=1)
    for half in (slice(0, I // 2), slice(I // 2, I)):
        rank = make_layer()
        rank.w13_weight = torch.cat([gate[:, half], up[:, half]], dim=1)
        rank.w2_weight = layer.w2_weight[:, :, half].contiguous()
        total += run(make_method(), rank, make_config(), dispatched).double()
    expect_close(layer, dispatched, silu_mul, total)


def test_router_weight_on_the_input() -> None:
    layer, dispatched = make_layer(), make_dispatched(top_k=1)
    config = make_config(apply_router_weight_on_input=True, top_k=1)
    expect_close(layer, dispatched, silu_mul, run(make_method(), layer, config, dispatched), on_input=True)


def test_fp8_weights_go_with_their_scales() -> None:
    layer, dispatched = make_layer(), make_dispatched()
    call = {}
    for name, parts in (("w13", 2), ("w2", 1)):
        values, scale, _ = quantize_weight(getattr(layer, f"{name}_weight"), "fp8_block", parts=parts)
        setattr(layer, f"{name}_weight", values)
        setattr(layer, f"{name}_weight_scale_inv", scale)
        call |= {name: values, f"{name}_scale": scale}
    topk_output = dispatched.topk_output
    routed = {"topk_weights": topk_output.topk_weights, "topk_ids": topk_output.topk_ids}
    expected = moe.fused_moe(dispatched.hidden_states, **routed, **call, format="fp8_block")
    assert torch.equal(run(fp8_method(), layer, make_config(), dispatched), expected)


def test_weights_replaced_while_serving_are_used() -> None:
    method, layer, dispatched = make_method(), make_layer(), make_dispatched()
    run(method, layer, make_config(), dispatched)
    layer.w2_weight = -3 * layer.w2_weight
    output = method.apply(layer=layer, dispatch_output=dispatched).hidden_states
    expect_close(layer, dispatched, silu_mul, output)


def test_weights_of_wrong_sizes_are_refused_when_loaded() -> None:
    layer = make_layer()
    layer.w13_weight = layer.w13_weight[:, :-8].contiguous()
    with pytest.raises(RuntimeError, match="^Experts: w13: expected "):
        run(make_method(), layer, make_config(), make_dispatched())


@pytest.mark.parametrize(
    "factor, on_gpu, in_topk, left",
    [
        (None, True, False, 1.0),
        (2.5, True, False, 2.5),  # SGLang leaves it to the runner
        (2.5, True, True, 1.0),  # TopK has applied it
        (2.5, False, False, 1.0),  # the model applies it
        (2.5, False, True, 1.0),
    ],
)
def test_the_scaling_factor_is_applied_once(factor, on_gpu, in_topk, left) -> None:
    config = make_config(routed_scaling_factor=factor)
    assert support.routed_scaling_factor(config, on_gpu=on_gpu, in_topk=in_topk) == left


# hooks ----------------------------------------------------------------------------------------------------------------


def build(monkeypatch, original, *, chosen: bool = True) -> SimpleNamespace:
    monkeypatch.setattr(hooks, "is_chosen", lambda: chosen)
    layer = SimpleNamespace()
    hooks.build_layer(original, layer, 1, two=2)
    return layer


def test_a_layer_that_was_not_taken_over_is_refused(monkeypatch) -> None:
    def original(layer, one, two):
        layer.quant_method = make_method("GPTQMoEMethod", runner=object())

    with pytest.raises(support.Unsupported, match="got experts under GPTQMoEMethod$"):
        build(monkeypatch, original)
    assert type(build(monkeypatch, original, chosen=False).quant_method).__name__ == "GPTQMoEMethod"


def test_an_error_of_an_unsupported_method_names_what_is_supported(monkeypatch) -> None:
    def original(layer, one, two):
        layer.quant_method = make_method(name)
        raise NotImplementedError("torch_moe")

    name = "Mxfp4MoEMethod"
    with pytest.raises(support.Unsupported, match="got NotImplementedError while SGLang built the layer: torch_moe"):
        build(monkeypatch, original)
    name = support.FP8  # an ordinary mistake in a supported layer keeps its own message
    with pytest.raises(NotImplementedError, match="^torch_moe$"):
        build(monkeypatch, original)


def test_old_versions_get_an_enum_member() -> None:
    backends = enum.Enum("Backends", {"AUTO": "auto"})
    hooks.add_enum_member(backends, support.NAME)
    assert backends("torch_moe").value == "torch_moe" and backends("torch_moe").name == "TORCH_MOE"
    assert backends("torch_moe") is backends("torch_moe") and backends("torch_moe") != backends.AUTO
    assert list(backends) == [backends.AUTO]


def test_the_entry_point_leads_to_the_plugin_and_imports_no_sglang() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    [target] = re.findall(r'\[project\.entry-points\."sglang\.srt\.plugins"\]\ntorch_moe = "(.+)"', text)
    module, function = target.split(":")
    assert callable(getattr(import_module(module), function))
    code = f"import sys, {module}; assert 'sglang' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


REGISTERED = """
from torch_moe_ops.integration.sglang import register
register()
from sglang.srt.plugins.hook_registry import HookRegistry
HookRegistry.apply_hooks()
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe import utils
from sglang.srt.layers.quantization import fp8, unquant
for function in (FusedMoE.__init__, unquant.UnquantizedFusedMoEMethod.create_moe_runner,
                 fp8.Fp8MoEMethod.create_moe_runner):
    assert hasattr(function, "__wrapped__"), function
resolve = getattr(utils, "resolve_moe_runner_backend", utils.MoeRunnerBackend)
assert resolve("torch_moe").value == "torch_moe" and not resolve("torch_moe").is_auto()
"""


@needs_sglang
def test_registration_in_the_installed_sglang() -> None:
    subprocess.run([sys.executable, "-c", REGISTERED], check=True)


# check ----------------------------------------------------------------------------------------------------------------

QWEN = {
    "hidden_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "intermediate_size": 999,
    "torch_dtype": "bfloat16",
}
FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def test_check_reads_the_experts_of_a_rank() -> None:
    assert check.read_config(QWEN, tp=4, ep=2) == check.ExpertsOfRank("bf16", 256, 128, 4, 2)
    assert check.read_config({"text_config": QWEN | FP8_CONFIG}) == check.ExpertsOfRank("fp8_block", 256, 256, 8, 2)


@pytest.mark.parametrize(
    "config, ranks, sentence",
    [
        ({**QWEN, "num_experts": None}, {}, "no num_experts or n_routed_experts"),
        (QWEN, {"tp": 2, "ep": 3}, "--tp 2 --ep 3 does not divide"),
        (QWEN | FP8_CONFIG, {"tp": 4}, "128x128 blocks do not fit 64 columns on a rank: use --ep 4"),
        (QWEN | {"quantization_config": {"quant_method": "gptq"}}, {}, "got quant_method gptq with"),
        (QWEN | {"torch_dtype": "float32"}, {}, "got float32"),
    ],
)
def test_check_says_why_not(config, ranks, sentence) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check.read_config(config, **ranks)


def test_check_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    assert adapter_main(["check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("\nsupported\n")
    assert adapter_main(["check", str(tmp_path / "absent")]) == 1
    assert "not supported: " in capsys.readouterr().out
