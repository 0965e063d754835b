"""A plugin of SGLang for tests: expert parallelism on a CPU, where SGLang's dispatcher asks for an accelerator, and
--enable-torch-compile with its native attention, where SGLang has compiled models run Intel's AMX kernels alone.
"""

# What SGLang asks of an attention that compiled models call; the native one keeps no state of its own.
COMPILED = {
    "init_cpu_graph_state": lambda *_: None,
    "init_forward_metadata_capture_cpu_graph": lambda *_, **__: None,
    "get_cpu_graph_seq_len_fill_value": lambda *_: 1,
}


def register() -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.utils.common.get_device", lambda *_, **__: "cpu", HookType.REPLACE)
    fakes = "sglang.srt.model_executor.cpu_graph_runner.register_fake_ops"  # of ops that are not installed
    HookRegistry.register(fakes, lambda *_: None, HookType.REPLACE)
    for name, function in COMPILED.items():
        setattr(TorchNativeAttnBackend, name, function)
