"""A plugin of SGLang for tests, for what SGLang does on accelerators alone: expert parallelism; --enable-torch-compile
and attention sinks with its native attention, which leaves the sinks out; the quantisation method mxfp4.
"""

from collections.abc import Callable

# What SGLang asks of an attention that compiled models call; the native one keeps no state of its own.
COMPILED = {
    "init_cpu_graph_state": lambda *_: None,
    "init_forward_metadata_capture_cpu_graph": lambda *_, **__: None,
    "get_cpu_graph_seq_len_fill_value": lambda *_: 1,
}


def without_sinks(original: Callable, *args: object, sinks: object = None, **options: object) -> object:
    return original(*args, **options)


def register() -> None:
    from sglang.srt.layers import quantization
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.utils.common.get_device", lambda *_, **__: "cpu", HookType.REPLACE)
    fakes = "sglang.srt.model_executor.cpu_graph_runner.register_fake_ops"  # of ops that are not installed
    HookRegistry.register(fakes, lambda *_: None, HookType.REPLACE)
    for name, function in COMPILED.items():
        setattr(TorchNativeAttnBackend, name, function)
    native = f"{TorchNativeAttnBackend.__module__}.{TorchNativeAttnBackend.__name__}"
    for name in ("forward_extend", "forward_decode"):
        HookRegistry.register(f"{native}.{name}", without_sinks, HookType.AROUND)
    quantization.QUANTIZATION_METHODS["mxfp4"] = quantization.Mxfp4Config
    quantization.BASE_QUANTIZATION_METHODS["mxfp4"] = quantization.Mxfp4Config
