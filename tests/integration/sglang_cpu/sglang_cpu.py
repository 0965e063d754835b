"""A plugin of SGLang for tests: on a CPU, what SGLang does on accelerators alone.

expert parallelism          its dispatcher asks for an accelerator
data-parallel attention     its collectives are CUDA ops, its copies Triton kernels, and it pins memory
--enable-torch-compile      of its attentions for CPUs only Intel's can be called from a compiled model
attention sinks             its native attention leaves them out
mxfp4                       a quantisation method that it registers on GPUs
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

# What SGLang asks of an attention that compiled or padded batches call; the native one keeps no state of its own.
ATTENTION = {
    "init_cpu_graph_state": lambda *_: None,
    "init_forward_metadata_capture_cpu_graph": lambda *_, **__: None,
    "get_cpu_graph_seq_len_fill_value": lambda *_: 1,
    "get_cuda_graph_seq_len_fill_value": lambda *_: 1,
}


def without_sinks(original: Callable, *args: object, sinks: object = None, **options: object) -> object:
    return original(*args, **options)


def without_pinned_memory(original: Callable, *args: object) -> object:
    import torch

    make = torch.tensor
    with mock.patch.object(torch, "tensor", lambda *values, pin_memory=False, **options: make(*values, **options)):
        return original(*args)


def all_gather_into_tensor(group: object, output: object, input: object) -> None:
    import torch

    torch.distributed.all_gather_into_tensor(output, input, group=group.device_group)


def reduce_scatter_tensor(group: object, output: object, input: object) -> object:
    import torch

    total, rows = input.clone(), output.shape[0]
    torch.distributed.all_reduce(total, group=group.device_group)
    return output.copy_(total[group.rank_in_group * rows :][:rows])


def register() -> None:
    from sglang.srt.layers import dp_attention, quantization
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    group, batch = "distributed.parallel_state.GroupCoordinator", "model_executor.forward_batch_info.ForwardBatch"
    native = "layers.attention.torch_native_backend.TorchNativeAttnBackend"
    hooks = {
        "utils.common.get_device": (lambda *_, **__: "cpu", HookType.REPLACE),
        "model_executor.cpu_graph_runner.register_fake_ops": (lambda *_: None, HookType.REPLACE),  # of absent ops
        f"{group}.all_gather_into_tensor": (all_gather_into_tensor, HookType.REPLACE),
        f"{group}.reduce_scatter_tensor": (reduce_scatter_tensor, HookType.REPLACE),
        f"{batch}.prepare_mlp_sync_batch": (without_pinned_memory, HookType.AROUND),
        f"{native}.forward_extend": (without_sinks, HookType.AROUND),
        f"{native}.forward_decode": (without_sinks, HookType.AROUND),
    }
    for target, (hook, kind) in hooks.items():
        HookRegistry.register(f"sglang.srt.{target}", hook, kind)
    for name, function in ATTENTION.items():
        setattr(TorchNativeAttnBackend, name, function)
    dp_attention.memcpy_func = dp_attention.memcpy_cpu
    quantization.QUANTIZATION_METHODS["mxfp4"] = quantization.Mxfp4Config
    quantization.BASE_QUANTIZATION_METHODS["mxfp4"] = quantization.Mxfp4Config
