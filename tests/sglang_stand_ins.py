"""Stand-ins for SGLang's objects, for tests of the adapter without SGLang: a configuration, a quantisation method, a
layer with the weights of one rank, and what its dispatcher hands over.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from torch_moe_ops.formats import quantize_weight
from torch_moe_ops.integration.sglang import support
from torch_moe_ops.integration.sglang.layer import LayerRunner

T, E, K, H, I = 9, 6, 2, 256, 128  # noqa: E741


def make_config(**changes: object) -> SimpleNamespace:
    """MoeRunnerConfig with the defaults of SGLang."""
    defaults = {
        "num_experts": E,  # of all ranks
        "top_k": K,
        "activation": "silu",
        "is_gated": True,
        "apply_router_weight_on_input": False,
        "no_combine": False,
        "no_combine_keep_router_weight": False,
        "routed_scaling_factor": None,
        "gemm1_alpha": None,
        "gemm1_beta": None,
        "gemm1_clamp_limit": None,
        "swiglu_limit": None,
        "gate_up_interleaved": True,
    }
    assert changes.keys() <= defaults.keys()
    return SimpleNamespace(**defaults | changes)


def make_method(name: str = "UnquantizedFusedMoEMethod", **attributes: object) -> object:
    method = type(name, (), {})()
    vars(method).update(attributes)
    return method


def fp8_method(**changes: object) -> object:
    attributes = {"use_mxfp8": False, "is_fp4_expert": False, "weight_block_size": [128, 128]}
    return make_method("Fp8MoEMethod", **attributes | changes)


def make_layer(dtype: torch.dtype = torch.bfloat16, *, parts: int = 2, bias: bool = False) -> nn.Module:
    random = torch.Generator().manual_seed(0)
    w13 = torch.randn(E, parts * I, H, generator=random) * 2 / H**0.5
    w2 = torch.randn(E, H, I, generator=random) / I**0.5
    layer = nn.Module()
    layer.w13_weight, layer.w2_weight = w13.to(dtype), w2.to(dtype)
    layer.moe_runner_config = SimpleNamespace(params_dtype=torch.bfloat16, gemm1_alpha=None, gate_up_interleaved=True)
    layer.intermediate_size_per_partition = I
    if bias:
        layer.w13_weight_bias = torch.randn(E, parts * I, generator=random)
        layer.w2_weight_bias = torch.randn(E, H, generator=random)
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


def quantise(layer: nn.Module, format: str, **names: str) -> dict[str, Tensor]:
    """Quantises a layer's weights in place, under SGLang's `names` of weight, scale and global scale; -> ours."""
    call = {}
    for name, parts in (("w13", 2), ("w2", 1)):
        values, scale, global_scale = quantize_weight(getattr(layer, f"{name}_weight"), format, parts=parts)
        delattr(layer, f"{name}_weight")
        call |= {name: values, f"{name}_scale": scale}
        stored = {"weight": values, "scale": scale.view(torch.uint8) if scale.element_size() == 1 else scale}
        if format == "nvfp4":
            stored["scale"] = scale
            global_scale = global_scale if parts == 2 else global_scale[:, 0]
            call[f"{name}_global_scale"] = stored["global_scale"] = global_scale
        names = {"weight": "weight", "scale": "weight_scale"} | names
        for kind, tensor in stored.items():
            setattr(layer, f"{name}_{names.get(kind)}", nn.Parameter(tensor, requires_grad=False))
    return call


MODELOPT = SimpleNamespace(get_name=lambda: "modelopt_fp4", is_checkpoint_nvfp4_serialized=True)
NVFP4 = make_method("ModelOptNvFp4FusedMoEMethod", quant_config=MODELOPT)
FORMATS = [
    ("fp8_block", fp8_method(), {"scale": "weight_scale_inv"}, ""),
    ("mxfp8", fp8_method(use_mxfp8=True, weight_block_size=[1, 32]), {"scale": "weight_scale_inv"}, ""),
    ("int8", make_method("W8A8Int8MoEMethod"), {}, ""),
    ("mxfp4", make_method("Mxfp4MoEMethod"), {}, "bf16"),
    ("nvfp4", NVFP4, {"global_scale": "weight_scale_2"}, ""),
]
GPT_OSS = {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "gate_up_interleaved": True}
