"""A plugin of SGLang: random weights for --load-format dummy that behave like a model's.

SGLang's own lie within 1e-3: e4m3 rounds them to 0, and the router's bias sends all tokens to the same experts. Here
every layer keeps the size of what goes through it and tokens spread over the experts, so that a server has the work of
a real one. A weight depends on its name alone: all backends get the same model.
"""

from __future__ import annotations

import zlib

import torch

E4M3_SIZE = 64.0  # standard deviation of the stored e4m3 values: few reach 448


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.model_loader.weight_utils.initialize_dummy_weights", initialize, HookType.REPLACE)


@torch.no_grad()
def initialize(model: torch.nn.Module, *_: object, **__: object) -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is {parameter.dtype}: only floating-point checkpoints can be made up")
        random = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        mean, size = distribution(name, parameters)
        for matrix in parameter.data if parameter.dim() == 3 else [parameter.data]:  # one expert at a time
            values = torch.randn(matrix.shape, generator=random, device=parameter.device)
            matrix.copy_(mean + size * values)


def distribution(name: str, parameters: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Mean and standard deviation."""
    parameter = parameters[name]
    if "norm" in name:
        return 1.0, 0.1
    if name.endswith("bias"):
        return 0.0, 0.01
    if "_scale" in name:
        columns = parameters[name.partition("_scale")[0]].shape[-1]
        return 1 / (E4M3_SIZE * columns**0.5), 0.0
    if parameter.element_size() == 1:
        return 0.0, E4M3_SIZE
    return 0.0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
