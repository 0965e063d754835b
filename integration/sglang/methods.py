"""SGLang's quantisation methods: how the experts of a layer are stored.

    method (the layer's quant_method), layer -> Stored(format, the layer's tensor for each argument of moe::fused_moe)

SGLang keeps w13 as [gate; up] for a backend it does not know, so only names differ, except for what is done once when
the weights have been loaded (`prepare`): FP8 with a scale per tensor becomes FP8 with 128x128 blocks of equal scales,
which is exact, FP4 experts of an FP8 checkpoint become MXFP4, and NVFP4 gets the global scales of its activations.
Nothing here imports SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .support import DTYPE_FORMATS, Unsupported, act_formats

SCALES = {"w13_scale": "w13_weight_scale", "w2_scale": "w2_weight_scale"}
INVERSE_SCALES = {"w13_scale": "w13_weight_scale_inv", "w2_scale": "w2_weight_scale_inv"}  # multipliers all the same
NVFP4_SCALES = SCALES | {"w13_global_scale": "w13_weight_scale_2", "w2_global_scale": "w2_weight_scale_2"}
NVFP4_SCALES |= {"a13_global_scale": "a13_global_scale", "a2_global_scale": "a2_global_scale"}


@dataclass(frozen=True)
class Stored:
    """How the experts of a layer are stored. `names`: argument of moe::fused_moe -> attribute of the layer."""

    format: str
    names: dict[str, str] = field(default_factory=dict)
    act_formats: Sequence[str] = ("",)  # what may multiply the weights, the best first; "" is the weights' format
    prepare: Callable[[nn.Module], None] = lambda layer: None


def unquantised(method: object, layer: nn.Module) -> Stored:
    return Stored(dtype_format(layer.w13_weight.dtype, "unquantised experts"))


def fp8(method: object, layer: nn.Module) -> Stored:
    if getattr(method, "is_fp4_expert", False):  # DeepSeek-V4: MXFP4 experts in an FP8 checkpoint
        return Stored("mxfp4", INVERSE_SCALES, act_formats("mxfp4", hidden_format(layer)), view_as_mxfp4)
    if layer.w13_weight.dtype != torch.float8_e4m3fn:
        raise Unsupported(f"FP8 experts in {layer.w13_weight.dtype}")  # to be quantised when loaded
    if getattr(method, "use_mxfp8", False):
        return Stored("mxfp8", INVERSE_SCALES, act_formats("mxfp8", hidden_format(layer)))
    block = getattr(method, "weight_block_size", None)
    return fp8_in_blocks(block, INVERSE_SCALES) if block is not None else fp8_per_tensor()


def view_as_mxfp4(layer: nn.Module) -> None:
    """SGLang loads such values as int8, and their scales, powers of two, as float32: both the same in MXFP4's types."""
    for name in ("w13", "w2"):
        values, scale = getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_weight_scale_inv")
        replace_parameter(layer, f"{name}_weight", values.detach().view(torch.uint8))
        replace_parameter(layer, f"{name}_weight_scale_inv", scale.detach().to(torch.float8_e8m0fnu))


def modelopt_fp8(method: object, layer: nn.Module) -> Stored:
    if layer.w13_weight.dtype != torch.float8_e4m3fn:
        raise Unsupported("experts to be quantised to FP8 while they are loaded")
    return fp8_per_tensor()


def fp8_in_blocks(block: Sequence[int], names: dict[str, str]) -> Stored:
    if list(block) != [128, 128]:
        raise Unsupported(f"FP8 experts in blocks of {list(block)}")
    return Stored("fp8_block", names)


def fp8_per_tensor() -> Stored:
    return Stored("fp8_block", INVERSE_SCALES, prepare=repeat_scales)


def repeat_scales(layer: nn.Module) -> None:
    """w13_weight_scale [E, 2] and w2_weight_scale [E] -> one per block, as parameters, so that they follow the experts.

    Scales of the checkpoint's activations are not needed: these are scaled in blocks, by their own maximum.
    """
    for name in ("w13", "w2"):
        weight, scale = getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_weight_scale")
        num_experts, rows, columns = weight.shape
        parts = scale.numel() // num_experts
        blocks = (-(-rows // parts // 128), -(-columns // 128))
        scale = scale.reshape(num_experts, parts, 1, 1).expand(-1, -1, *blocks).flatten(1, 2)
        replace_parameter(layer, f"{name}_weight_scale_inv", scale.contiguous())


def int8(method: object, layer: nn.Module) -> Stored:
    return Stored("int8", SCALES)


def mxfp4(method: object, layer: nn.Module) -> Stored:
    size, stored = layer.intermediate_size_per_partition, layer.w2_weight.shape[2] * 2
    if stored % 32:  # then SGLang's loader hands out other sizes than it has made room for
        raise Unsupported(f"MXFP4 experts of {stored} columns on a rank, no multiple of 32")
    if stored != size and not interleaved(layer.moe_runner_config):
        raise Unsupported(f"MXFP4 experts of {size} columns, which SGLang stores as {stored} for gate and up alike")
    return Stored("mxfp4", SCALES, act_formats("mxfp4", hidden_format(layer)))


def nvfp4(method: object, layer: nn.Module) -> Stored:
    config = method.quant_config
    if config.get_name() != "modelopt_fp4" or not config.is_checkpoint_nvfp4_serialized:
        raise Unsupported("experts to be quantised to NVFP4 while they are loaded")
    hidden, only_weights = hidden_format(layer), getattr(config, "is_w4a16", False)

    def prepare(layer: nn.Module) -> None:
        """One scale for all experts, also those of other ranks: the result does not depend on who computes it."""
        for name in ("13", "2"):
            scale = getattr(layer, f"w{name}_input_scale").max().float().reshape(1)
            replace_buffer(layer, f"a{name}_global_scale", scale, persistent=True)

    return Stored("nvfp4", NVFP4_SCALES, (hidden,) if only_weights else act_formats("nvfp4", hidden), prepare)


def compressed_tensors(method: object, layer: nn.Module) -> Stored:
    """The layer's scheme decides."""
    scheme = layer.scheme
    name = type(scheme).__name__
    if name == "CompressedTensorsW8A8Fp8MoE":
        strategy = getattr(scheme.weight_quant.strategy, "value", scheme.weight_quant.strategy)
        if strategy == "block":
            return fp8_in_blocks(scheme.weight_block_size, SCALES)
        if strategy == "tensor":
            return fp8_per_tensor()
        raise Unsupported(f"FP8 experts with a scale per {strategy}")
    if name == "CompressedTensorsW4A4Nvfp4MoE":
        method.load_up_proj_weight_first = False  # read by the loader, later
        return Stored("nvfp4", NVFP4_SCALES, act_formats("nvfp4", hidden_format(layer)), invert_global_scales)
    if name == "CompressedTensorsW4A16Nvfp4MoE":  # also what newer versions make of W4A4 where a GPU has no NVFP4
        return Stored("nvfp4", NVFP4_SCALES, (hidden_format(layer),), invert_global_scales)
    raise Unsupported(f"experts under {name}")


def invert_global_scales(layer: nn.Module) -> None:
    """compressed-tensors stores the largest representable value over the largest value, that is 1 / global scale."""
    for name in ("13", "2"):
        layer.register_parameter(f"w{name}_weight", getattr(layer, f"w{name}_weight_packed"))
        replace_parameter(layer, f"w{name}_weight_scale_2", 1 / getattr(layer, f"w{name}_weight_global_scale").float())
        if (act_scale := getattr(layer, f"w{name}_input_global_scale", None)) is not None:
            scale = 1 / act_scale.min().float().reshape(1)
            replace_buffer(layer, f"a{name}_global_scale", scale, persistent=True)


def replace_parameter(layer: nn.Module, name: str, value: torch.Tensor) -> None:
    """In the memory of the one before if it fits there: CUDA graphs outlive an update of the weights."""
    old = getattr(layer, name, None)
    if not overwrite(old, value):
        parameter = nn.Parameter(value, requires_grad=False)
        parameter.__dict__.update(getattr(old, "__dict__", {}))  # weight_loader and the like
        setattr(layer, name, parameter)


def replace_buffer(layer: nn.Module, name: str, value: torch.Tensor, *, persistent: bool = False) -> None:
    """The same for what is the same for all experts. SGLang keeps and restores buffers when it gives memory back.

    `persistent` if it is made of weights: sharded states are loaded over a layer that was prepared before.
    """
    if not overwrite(getattr(layer, name, None), value):
        layer.register_buffer(name, value, persistent=persistent)


def overwrite(old: torch.Tensor | None, value: torch.Tensor) -> bool:
    """Copies value into old where it fits there exactly; whether it did."""

    def layout(tensor: torch.Tensor) -> tuple[object, ...]:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    fits = old is not None and layout(old) == layout(value)
    if fits:
        old.data.copy_(value)
    return fits


def dtype_format(dtype: torch.dtype, what: str) -> str:
    if dtype not in DTYPE_FORMATS:
        raise Unsupported(f"{what} in {dtype}")
    return DTYPE_FORMATS[dtype]


def hidden_format(layer: nn.Module) -> str:
    return dtype_format(layer.moe_runner_config.params_dtype, "hidden states")


def interleaved(config: object) -> bool:
    """gpt-oss: rows of gate and up alternate."""
    return config.gemm1_alpha is not None and bool(config.gate_up_interleaved)


# By the name of the quantisation method's class, with its module below sglang.srt.layers.quantization.
METHODS: dict[str, tuple[str, Callable[[object, nn.Module], Stored]]] = {
    "UnquantizedFusedMoEMethod": ("unquant", unquantised),
    "Fp8MoEMethod": ("fp8", fp8),
    "W8A8Int8MoEMethod": ("w8a8_int8", int8),
    "Mxfp4MoEMethod": ("mxfp4", mxfp4),
    "ModelOptFp8MoEMethod": ("modelopt_quant", modelopt_fp8),
    "ModelOptNvFp4FusedMoEMethod": ("modelopt_quant", nvfp4),
    "CompressedTensorsFusedMoEMethod": ("compressed_tensors.compressed_tensors", compressed_tensors),
}


def stored(method: object, layer: nn.Module) -> Stored:
    """An Unsupported error names what the adapter does not take."""
    name = type(method).__name__
    if name not in METHODS:
        raise Unsupported(f"experts under {name}")
    return METHODS[name][1](method, layer)
