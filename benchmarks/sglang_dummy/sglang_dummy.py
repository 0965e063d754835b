"""A plugin of SGLang: random weights for --load-format dummy that behave like a model's.

SGLang's own lie within 1e-3: e4m3 rounds them to 0, and the router's bias sends all tokens to the same experts. Here
every layer keeps the size of what goes through it and tokens spread over the experts, so that a server has the work of
a real one. A weight depends on its name alone: all backends get the same model.
"""

from __future__ import annotations

import zlib

import torch

# What a byte of quantised weights holds: the standard deviation of the values drawn for it, and how many they are. Few
# values reach the largest of e4m3 or int8; of e2m1 every code is as likely.
STORED = {torch.float8_e4m3fn: (64.0, 1), torch.int8: (40.0, 1), torch.uint8: (2.926, 2)}
INPUT_SCALE = 64 / (6 * 448)  # NVFP4 activations up to 64 keep their size


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.model_loader.weight_utils.initialize_dummy_weights", initialize, HookType.REPLACE)


@torch.no_grad()
def initialize(model: torch.nn.Module, *_: object, **__: object) -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        random = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        for matrix in parameter.data if parameter.dim() == 3 else [parameter.data]:  # one expert at a time
            matrix.copy_(draw(name, parameters, matrix, random))


def draw(name: str, parameters: dict[str, torch.Tensor], like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """New values for one matrix of a parameter."""
    if like.dtype == torch.uint8 and "_scale" not in name:
        return torch.randint(256, like.shape, generator=random, device=like.device, dtype=like.dtype)
    mean, size = distribution(name, parameters)
    values = mean + size * torch.randn(like.shape, generator=random, device=like.device)
    if like.dtype == torch.uint8:  # a power of two
        return 127 + values.log2().round()
    return values.round().clamp(-127, 127) if like.dtype == torch.int8 else values


def distribution(name: str, parameters: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Mean and standard deviation."""
    parameter = parameters[name]
    if "norm" in name:
        return 1.0, 0.1
    if name.endswith("bias"):
        return 0.0, 0.01
    if "input_scale" in name:
        return INPUT_SCALE, 0.0
    if f"{name}_2" in parameters:  # NVFP4: the global scale has the size
        return 1.0, 0.0
    if "_scale" in name:
        weight = parameters[name.partition("_scale")[0]]
        size, values = STORED[weight.dtype]
        return 1 / (size * (weight.shape[-1] * values) ** 0.5), 0.0
    if parameter.dtype in STORED:
        return 0.0, STORED[parameter.dtype][0]
    return 0.0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
