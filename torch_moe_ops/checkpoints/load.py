"""load_experts: {prefix}.* of a checkpoint -> w13 [E, 2I, H/pack] (gate over up), w2 [E, H, I/pack], their scales."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..formats import FORMATS, Format
from ..meta_kernels._check import FLOATS, describe, refuse
from ..meta_kernels.grouped_gemm import check_formats
from .files import Checkpoint
from .schemes import GPT_OSS, OP, Reader, find_reader

# gpt-oss's activation, which its config only names: (up + 1) * gate * sigmoid(1.702 gate), both clamped at 7.
GPT_OSS_ACTIVATION = {"activation": "silu", "alpha": 1.702, "beta": 1.0, "limit": 7.0}


def load_experts(
    checkpoint: Checkpoint | str | Path,
    prefix: str,
    *,
    experts: Sequence[int] | None = None,
    format: str = "",
    act_format: str = "",
    device: str | torch.device = "cpu",
) -> dict[str, object]:
    """The experts of one layer as arguments: ``Experts(**load_experts(path, "model.layers.3.mlp.experts"))``.

    Nothing is converted: the format is the checkpoint's, codes and scales keep their bits, and gate and up keep their
    own global scales (w13_global_scale [E, 2]).

    Args:
        checkpoint: an open `Checkpoint`, a directory of safetensors files, or one such file.
        prefix: what stands in front of the experts' tensors.
        experts: the experts to load, in this order, for expert parallelism; all if absent. If they are not all, the
            result has an `expert_map` from the router's ids to theirs.
        format: what the checkpoint must hold; anything if empty. Another format is an error, never a conversion.
        act_format: "bf16", say, for unquantised activations: the checkpoint's input scales are left out then. If empty,
            what the checkpoint was made for: "bf16" for NVFP4 without input scales.
        device: where the result lies. It is filled expert by expert, so nothing is there twice.

    Returns:
        Keyword arguments of `Experts`: w13, w2, their scales, global scales and biases, a13_global_scale and
        a2_global_scale where the checkpoint has input scales (gate's and up's are one: the larger), format, act_format,
        expert_map, and for gpt-oss its activation.

    Raises:
        RuntimeError: ``load_experts: tensor: expected ..., got ...``
        ModuleNotFoundError: without the package safetensors (``pip install '.[checkpoints]'``).

    Knows ModelOpt NVFP4, compressed-tensors NVFP4, MXFP4, FP8 128x128 and INT8, DeepSeek FP8 and MXFP4, MXFP8, gpt-oss
    MXFP4, bfloat16 and float16. Each is recognised by the names, dtypes and shapes of its tensors.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    reader = find_reader(checkpoint, prefix)
    scheme, chosen = reader.scheme, _choose(experts, reader.num_experts)
    if format not in ("", scheme.format):
        held = f"{scheme.format}, which the checkpoint holds ({scheme.name}); convert_weight changes it"
        refuse(OP, "format", held, format)
    act_format = act_format or scheme.act_format
    if not act_format and scheme.input_scale and "input_scale" not in reader.kinds:
        act_format = "bf16"  # quantised for weights alone
    _, act = check_formats(OP, scheme.format, act_format)
    stack = _Stack(reader, chosen, torch.device(device))
    result: dict[str, object] = {"format": scheme.format, "act_format": act_format}
    for name, projections in (("w13", ("gate", "up")), ("w2", ("down",))):
        result[name] = stack.matrices(projections, "weight")
        result[f"{name}_scale"] = stack.matrices(projections, "scale")
        result[f"{name}_bias"] = stack.matrices(projections, "bias")
        global_scale = stack.numbers(projections, "global_scale")  # [E, parts]
        result[f"{name}_global_scale"] = global_scale if len(projections) > 1 else _squeeze(global_scale)
        input_scale = stack.numbers(projections, "input_scale") if act.has_global_scale else None
        input_name = f"a{name.removeprefix('w')}_global_scale"
        result[input_name] = None if input_scale is None else input_scale.amax(1)  # both read the same activations
    if len(chosen) < reader.num_experts or list(chosen) != sorted(chosen):
        result["expert_map"] = _expert_map(chosen, reader.num_experts, stack.device)
    if scheme is GPT_OSS:
        result |= GPT_OSS_ACTIVATION
    return {name: value for name, value in result.items() if value is not None}


def _choose(experts: Sequence[int] | None, num_experts: int) -> Sequence[int]:
    if experts is None:
        return range(num_experts)
    try:
        chosen = [operator.index(expert) for expert in experts]
    except TypeError:
        refuse(OP, "experts", "a sequence of whole numbers", experts)
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= e < num_experts for e in chosen):
        refuse(OP, "experts", f"different numbers from 0 to {num_experts - 1}", chosen)
    return chosen


def _expert_map(chosen: Sequence[int], num_experts: int, device: torch.device) -> Tensor:
    """int32 [Eg]: the position of each expert among the chosen ones, -1 for those of other ranks."""
    expert_map = torch.full((num_experts,), -1, dtype=torch.int32, device="cpu")
    expert_map[list(chosen)] = torch.arange(len(chosen), dtype=torch.int32, device="cpu")
    return expert_map.to(device)


def _squeeze(global_scale: Tensor | None) -> Tensor | None:
    return None if global_scale is None else global_scale.squeeze(1)


class _Stack:
    """Tensors of the experts on top of each other, every one checked against the sizes H and I of the first."""

    def __init__(self, reader: Reader, experts: Sequence[int], device: torch.device) -> None:
        self.reader, self.experts, self.device = reader, experts, device
        self.format: Format = FORMATS[reader.scheme.format]
        weight = reader.read(experts[0], "gate", "weight")
        if weight.dim() != 2:
            refuse(OP, reader.name(experts[0], "gate", "weight"), "[I, H/pack]", list(weight.shape))
        intermediate, columns = weight.shape
        self.sizes = intermediate, columns * self.format.pack  # I, H

    def matrices(self, projections: Sequence[str], kind: str) -> Tensor | None:
        """weight, scale or bias: [E, parts * rows, ...]; None if the checkpoint has none."""
        if kind not in self.reader.kinds:
            return None
        shape, dtype = self._shape(projections[0], kind), self._dtype(kind)
        rows = shape[0]
        size = (len(self.experts), len(projections) * rows, *shape[1:])
        result = torch.empty(size, dtype=dtype, device=self.device)
        for i, expert in enumerate(self.experts):
            for part, projection in enumerate(projections):
                tensor = self.reader.read(expert, projection, kind)
                if tensor.shape != shape or tensor.dtype != dtype:
                    expected, got = (describe(*facts, tensor.device) for facts in ((dtype, shape), _facts(tensor)))
                    refuse(OP, self.reader.name(expert, projection, kind), expected, got)
                if kind == "scale" and not _is_finite(tensor):
                    values = tensor.float()
                    got = values[~values.isfinite()][0].item()
                    refuse(OP, self.reader.name(expert, projection, kind), "finite numbers", got)
                result[i, part * rows : (part + 1) * rows] = tensor
        return result

    def numbers(self, projections: Sequence[str], kind: str) -> Tensor | None:
        """global_scale or input_scale: float32 [E, parts]; None if the checkpoint has none."""
        if kind not in self.reader.kinds:
            return None
        result = torch.empty(len(self.experts), len(projections), dtype=torch.float32, device="cpu")
        for i, expert in enumerate(self.experts):
            for part, projection in enumerate(projections):
                number, name = self.reader.read(expert, projection, kind), self.reader.name(expert, projection, kind)
                if number.numel() != 1:
                    refuse(OP, name, "one number", describe(*_facts(number), number.device))
                if not 0 < number.item() < torch.inf:
                    refuse(OP, name, "a positive finite number", self.reader.checkpoint.read(name).item())
                result[i, part] = number
        return result.to(self.device)

    def _shape(self, projection: str, kind: str) -> tuple[int, ...]:
        """Of one expert's projection."""
        rows, k = self.sizes if projection != "down" else reversed(self.sizes)
        if kind == "bias":
            return (rows,)
        return self.format.weight_scale_shape(rows, k) if kind == "scale" else (rows, k // self.format.pack)

    def _dtype(self, kind: str) -> torch.dtype:
        """What the ops take; for biases any float type, the first one's."""
        if kind == "bias":
            first = (self.experts[0], "gate", kind)
            bias = self.reader.read(*first)
            if bias.dtype not in FLOATS:
                got = describe(*_facts(bias), bias.device)
                refuse(OP, self.reader.name(*first), "bfloat16, float16 or float32", got)
            return bias.dtype
        return self.format.dtype if kind == "weight" else self.format.scale_dtype


def _is_finite(scale: Tensor) -> bool:
    if scale.dtype == torch.float8_e8m0fnu:  # isfinite() takes its NaN for a number
        return not scale.numel() or bool(scale.view(torch.uint8).max() < 255)
    values = scale.float() if scale.dtype == torch.float8_e4m3fn else scale  # which isfinite() does not take
    return bool(values.isfinite().all())


def _facts(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape
