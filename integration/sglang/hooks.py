"""The flag's value, the backend's name, and the hooks in SGLang's classes.

    create_moe_runner of every class in METHODS     gives the layer to layer.LayerRunner
    FusedMoE.__init__                               refuses a layer that was not given
    model_loader.loader._initialize_model           refuses a model whose experts are no such layers
    WeightUpdater's methods that load alone         derive anew what was derived from the weights
    ModelOptNvFp4FusedMoEMethod.__init__, CompressedTensorsW4A4Nvfp4MoE.__init__,
    CompressedTensorsConfig.get_quant_method        accept what SGLang has no kernel for on this device, but we do

A hook does nothing unless the flag's value is torch_moe for the layer being built, so other backends, and a speculative
draft model with one of its own, stay as they are. Versions are told apart by what they have, not by their number.
"""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name

from torch import nn

from .layer import NO_UPDATES, LayerRunner
from .methods import METHODS
from .support import NAME, OWN_EXPERTS, Unsupported, own_experts

QUANTISATION = "sglang.srt.layers.quantization"
COMPRESSED = f"{QUANTISATION}.compressed_tensors"
LAYER = "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE"
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater"
UPDATES = (  # after which SGLang does not call process_weights_after_loading()
    "update_weights_from_tensor",
    "update_weights_from_distributed",  # 0.5.17
    "load_weights_from_distributed",
    "update_weights_from_ipc",
)


def register_name() -> None:
    """Makes `torch_moe` a choice of the flag and a backend's name."""
    from sglang.srt import server_args
    from sglang.srt.layers.moe import utils

    server_args.add_moe_runner_backend_choices([NAME])
    # Not that mxfp8 were supported: SGLang replaces backends outside this list in silence, and we want to refuse.
    server_args.add_mxfp8_moe_runner_backend_choices([NAME])
    if hasattr(utils, "register_moe_runner_backend_name"):
        utils.register_moe_runner_backend_name(NAME)
    else:  # SGLang < 0.5.19 looks the name up in an Enum
        add_enum_member(utils.MoeRunnerBackend, NAME)


def add_enum_member(enum: type, value: str) -> None:
    """Makes enum(value) work. It stays out of the iteration over the members."""
    member = object.__new__(enum)
    member._name_, member._value_ = value.upper(), value
    enum._value2member_map_[value] = member


def register_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    methods = (f"{QUANTISATION}.{module}:{name}" for name, (module, _) in METHODS.items())
    hooks = {f"{method}.create_moe_runner": create_moe_runner for method in methods}
    hooks[f"{LAYER}.__init__"] = build_layer
    hooks["sglang.srt.model_loader.loader:_initialize_model"] = build_model
    hooks[f"{QUANTISATION}.modelopt_quant:ModelOptNvFp4FusedMoEMethod.__init__"] = init_nvfp4
    hooks[f"{COMPRESSED}.schemes.compressed_tensors_w4a4_nvfp4_moe:CompressedTensorsW4A4Nvfp4MoE.__init__"] = init_nvfp4
    hooks[f"{COMPRESSED}.compressed_tensors:CompressedTensorsConfig.get_quant_method"] = get_quant_method
    updates = (name for name in UPDATES if hasattr(resolve_name(UPDATER), name))
    hooks |= {f"{UPDATER}.{name}": update_weights for name in updates}
    for target, hook in hooks.items():
        resolve_name(target)  # SGLang only logs a hook that does not apply; this raises
        HookRegistry.register(target.replace(":", "."), hook, HookType.AROUND)


def create_moe_runner(original: Callable, method: object, layer: object, moe_runner_config: object) -> None:
    """Instead of the original, which looks for a runner of SGLang's own."""
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    if not is_chosen():
        return original(method, layer, moe_runner_config)
    refuse_server_settings()
    backend = get_moe_runner_backend()
    LayerRunner(method, layer, moe_runner_config, backend, StandardCombineInput).take_over(method)


def init_nvfp4(original: Callable, method: object, *args: object) -> None:
    """Both constructors refuse GPUs without NVFP4 instructions; what they would have set, had they not raised."""
    try:
        original(method, *args)
    except ValueError:
        if not is_chosen():
            raise
        method.group_size = 16
        method.enable_flashinfer_trtllm_moe = method.use_flashinfer_trtllm = False
        method.use_flashinfer_trtllm_weight_layout = False
        method._cache_permute_indices = {}


def get_quant_method(original: Callable, config: object, *args: object, **options: object) -> object:
    """compressed-tensors with int8 weights and activations, which SGLang has for NPUs alone: as its own int8 format."""
    try:
        return original(config, *args, **options)
    except NotImplementedError as error:
        from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8MoEMethod

        if not is_chosen() or "W8A8Int8" not in str(error):
            raise
        return W8A8Int8MoEMethod(config)


def build_layer(original: Callable, layer: object, *args: object, **options: object) -> None:
    """FusedMoE.__init__, and an error where SGLang would run another backend than the one that was asked for."""
    try:
        original(layer, *args, **options)
    except Unsupported:
        raise
    except Exception as error:  # a quantisation method that does not know the name fails in many ways
        method = type(getattr(layer, "quant_method", None)).__name__
        if is_chosen() and method not in METHODS:
            raise Unsupported(f"{type(error).__name__} while SGLang built the layer: {error}") from error
        raise
    if not is_chosen():
        return
    if not is_taken_over(layer):
        raise Unsupported(f"experts under {type(layer.quant_method).__name__}")
    layer.should_fuse_routed_scaling_factor_in_topk = False  # not all models tell TopK, so the runner applies it


def build_model(original: Callable, *args: object, **options: object) -> nn.Module:
    """A model, and an error where it routes tokens to experts that are not ours."""
    from sglang.srt.layers.moe.topk import TopK

    model = original(*args, **options)
    if is_chosen():
        name, modules = type(model).__name__, list(model.modules())
        routes = any(isinstance(module, TopK) for module in modules)
        if name in OWN_EXPERTS or (routes and not any(map(is_taken_over, modules))):
            raise Unsupported(own_experts(name))
    return model


def update_weights(original: Callable, updater: object, *args: object, **options: object) -> object:
    """An update of weights while the server runs, or a part of one."""
    result = original(updater, *args, **options)
    for layer in filter(is_taken_over, updater.get_model().modules()):
        if getattr(layer, NO_UPDATES, None) is None:
            layer.quant_method.runner.stored.prepare(layer)
    return result


def is_taken_over(layer: nn.Module) -> bool:
    return isinstance(getattr(getattr(layer, "quant_method", None), "runner", None), LayerRunner)


def is_chosen() -> bool:
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    return get_moe_runner_backend().value == NAME


def refuse_server_settings() -> None:
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend, is_sbo_enabled
    from sglang.srt.runtime_context import get_server_args

    if not get_moe_a2a_backend().is_none():
        raise Unsupported(f"--moe-a2a-backend {get_moe_a2a_backend().value}")
    if is_sbo_enabled():
        raise Unsupported("--enable-single-batch-overlap")
    args = get_server_args()
    if getattr(args, "enable_lora", None) or getattr(args, "lora_paths", None):
        raise Unsupported("LoRA adapters")
    if getattr(args, "kt_weight_path", None):
        raise Unsupported("--kt-weight-path")
