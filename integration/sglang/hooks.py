"""The flag's value, the backend's name, and the hooks in SGLang's classes.

    UnquantizedFusedMoEMethod.create_moe_runner, Fp8MoEMethod.create_moe_runner    give the layer to layer.LayerRunner
    FusedMoE.__init__                                                              refuses a layer that was not given

A hook does nothing unless the flag's value is torch_moe for the layer being built, so other backends, and a speculative
draft model with one of its own, stay as they are. Versions are told apart by what they have, not by their number.
"""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name

from .layer import LayerRunner
from .support import FP8, NAME, UNQUANTISED, Unsupported

QUANTISATION = "sglang.srt.layers.quantization"
METHODS = (f"{QUANTISATION}.unquant:{UNQUANTISED}", f"{QUANTISATION}.fp8:{FP8}")
LAYER = "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE"


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

    hooks = {f"{method}.create_moe_runner": create_moe_runner for method in METHODS}
    hooks[f"{LAYER}.__init__"] = build_layer
    for target, hook in hooks.items():
        resolve_name(target)  # SGLang only logs a hook that does not apply; this raises
        HookRegistry.register(target.replace(":", "."), hook, HookType.AROUND)


def create_moe_runner(original: Callable, method: object, layer: object, moe_runner_config: object) -> None:
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    original(method, layer, moe_runner_config)
    if is_chosen():
        refuse_server_settings()
        backend = get_moe_runner_backend()
        LayerRunner(method, layer, moe_runner_config, backend, StandardCombineInput).take_over(method)


def build_layer(original: Callable, layer: object, *args: object, **options: object) -> None:
    """FusedMoE.__init__, and an error where SGLang would run another backend than the one that was asked for."""
    try:
        original(layer, *args, **options)
    except Unsupported:
        raise
    except Exception as error:  # a quantisation method that does not know the name fails in many ways
        method = type(getattr(layer, "quant_method", None)).__name__
        if is_chosen() and method not in (UNQUANTISED, FP8):
            raise Unsupported(f"{type(error).__name__} while SGLang built the layer: {error}") from error
        raise
    if is_chosen() and not isinstance(getattr(layer.quant_method, "runner", None), LayerRunner):
        raise Unsupported(f"experts under {type(layer.quant_method).__name__}")


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
