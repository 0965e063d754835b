"""The SGLang adapter's hooks without SGLang, and its entry point."""

from __future__ import annotations

import enum
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang_stand_ins import E, fp8_method, make_config, make_dispatched, make_layer, make_method, run
from torch import nn

from torch_moe_ops.integration.sglang import hooks, support
from torch_moe_ops.integration.sglang.layer import LayerRunner

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("on_gpu", [False, True])
def test_topk_does_not_apply_the_scaling_factor(monkeypatch, on_gpu: bool) -> None:
    """SGLang wants TopK to apply it to NVFP4 experts, but not all of its models tell TopK so (Bailing, LLaDA2)."""
    monkeypatch.setattr(LayerRunner, "on_gpu", on_gpu)

    def original(layer, one, two):
        method = make_method(runner=LayerRunner(make_method(), make_layer(), make_config(), None, SimpleNamespace))
        layer.quant_method, layer.should_fuse_routed_scaling_factor_in_topk = method, True

    assert not build(monkeypatch, original).should_fuse_routed_scaling_factor_in_topk
    assert build(monkeypatch, original, chosen=False).should_fuse_routed_scaling_factor_in_topk


def test_an_error_of_an_unsupported_method_names_what_is_supported(monkeypatch) -> None:
    def original(layer, one, two):
        layer.quant_method = make_method(name)
        raise NotImplementedError("torch_moe")

    name = "AWQMoEMethod"
    with pytest.raises(support.Unsupported, match="got NotImplementedError while SGLang built the layer: torch_moe"):
        build(monkeypatch, original)
    name = "Fp8MoEMethod"  # an ordinary mistake in a supported layer keeps its own message
    with pytest.raises(NotImplementedError, match="^torch_moe$"):
        build(monkeypatch, original)


class TopK(nn.Module):
    pass


def experts(*, taken_over: bool) -> nn.Module:
    layer = nn.Module()
    runner = LayerRunner(make_method(), make_layer(), make_config(), None, SimpleNamespace) if taken_over else None
    layer.quant_method = make_method(runner=runner)
    return layer


def build_model(monkeypatch, *parts: nn.Module, name: str = "Model", chosen: bool = True) -> nn.Module:
    monkeypatch.setattr(hooks, "is_chosen", lambda: chosen)
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.moe.topk", SimpleNamespace(TopK=TopK))
    return hooks.build_model(lambda *args: type(name, (nn.Sequential,), {})(*args), *parts)


def test_a_model_that_runs_its_experts_itself_is_refused(monkeypatch) -> None:
    """AFMoE, DBRX, DeepSeek-V1 and XVERSE route with TopK and call a function of SGLang's."""
    with pytest.raises(support.Unsupported, match="got Model, whose code is made for SGLang's own experts$"):
        build_model(monkeypatch, nn.Linear(1, 1), TopK(), experts(taken_over=False))
    with pytest.raises(support.Unsupported, match="got InklingForConditionalGeneration, whose code is made for"):
        build_model(monkeypatch, experts(taken_over=True), name="InklingForConditionalGeneration")
    with pytest.raises(support.Unsupported, match="got QuantMixtralForCausalLM, whose code is made for"):
        build_model(monkeypatch, nn.Linear(1, 1), name="QuantMixtralForCausalLM")  # SGLang's, of most quantisations
    for parts in [(), (nn.Linear(1, 1),), (TopK(), experts(taken_over=True))]:  # a draft model may be dense
        assert len(build_model(monkeypatch, *parts)) == len(parts)
    assert len(build_model(monkeypatch, TopK(), chosen=False)) == 1


def test_an_update_of_weights_derives_scales_anew() -> None:
    """SGLang loads tensors that come over the network without process_weights_after_loading()."""

    def fp8_per_tensor(factor: float) -> nn.Module:
        layer = make_layer()
        for name, parts in (("w13", 2), ("w2", 1)):
            weight = factor * getattr(layer, f"{name}_weight")
            scale = weight.reshape(E, parts, -1).float().abs().amax(2) / 448
            values = (weight.reshape(E, parts, -1) / scale.unsqueeze(2)).to(torch.float8_e4m3fn).reshape(weight.shape)
            delattr(layer, f"{name}_weight")
            layer.register_parameter(f"{name}_weight", nn.Parameter(values, requires_grad=False))
            layer.register_parameter(f"{name}_weight_scale", nn.Parameter(scale.squeeze(1), requires_grad=False))
        return layer

    dispatched, method, layer = make_dispatched(), fp8_method(weight_block_size=None), fp8_per_tensor(1.0)
    run(method, layer, make_config(), dispatched)
    layer.quant_method, new = method, fp8_per_tensor(3.0)
    expected = run(fp8_method(weight_block_size=None), new, make_config(), dispatched)
    addresses = {name: tensor.data_ptr() for name, tensor in layer.named_parameters()}
    updater = SimpleNamespace(get_model=lambda: nn.Sequential(nn.Linear(1, 1), layer))

    def load(updater: object, tensors: str, load_format: str) -> tuple[bool, str]:
        for name in ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale"):
            getattr(layer, name).data.copy_(getattr(new, name))
        return True, f"{tensors} {load_format}"

    assert hooks.update_weights(load, updater, "tensors", load_format="direct") == (True, "tensors direct")
    assert torch.equal(method.apply(layer=layer, dispatch_output=dispatched).hidden_states, expected)
    assert {name: tensor.data_ptr() for name, tensor in layer.named_parameters()} == addresses  # CUDA graphs read there


@pytest.mark.parametrize(
    "settings, got",
    [
        ({"lora_paths": ["x"]}, "LoRA adapters"),
        ({"enable_lora": True}, "LoRA adapters"),
        ({"kt_weight_path": "x"}, "--kt-weight-path"),
    ],
    ids=str,
)
def test_settings_of_the_server_are_refused(monkeypatch, settings: dict[str, object], got: str) -> None:
    utils = SimpleNamespace(
        get_moe_a2a_backend=lambda: SimpleNamespace(is_none=lambda: True), is_sbo_enabled=lambda: False
    )
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.moe.utils", utils)
    for args in (SimpleNamespace(), SimpleNamespace(enable_lora=False, lora_paths=None, kt_weight_path=None)):
        context = SimpleNamespace(get_server_args=lambda args=args: args)
        monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
        hooks.refuse_server_settings()
        vars(args).update(settings)
        with pytest.raises(support.Unsupported, match=f"got {got}$"):
            hooks.refuse_server_settings()


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
