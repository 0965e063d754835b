"""What checkpoints call the tensors of an expert, and what these mean: x ~= codes * scale * global_scale.

Most checkpoints have a tensor per expert and projection, `{prefix}.{expert}.{projection}.{suffix}`: `Separate`. gpt-oss
has one per layer, with gate and up rows that alternate: `GptOss`. Both give `read(expert, projection, kind)`, for a
projection gate, up or down and a kind of KINDS, in the dtypes that the ops take. Which scheme it is follows from names,
dtypes and shapes alone. A tensor that no scheme knows is an error: it may be a bias or a scale, not to be dropped.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from ..formats import FORMATS, Format
from ..meta_kernels._check import describe, refuse
from .files import Checkpoint

OP = "load_experts"
KINDS = ("weight", "scale", "global_scale", "input_scale", "bias")
GATE_UP_DOWN = ("gate", "up", "down")
# What they are called: almost everywhere, and in Mixtral and its descendants.
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
FLOAT_SCALES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Scheme:
    """The suffixes of one expert's tensors by kind ("" if there is none), and the dtypes that tell schemes apart."""

    name: str
    format: str
    weight: str = "weight"
    scale: str = ""
    global_scale: str = ""
    input_scale: str = ""
    bias: str = "bias"
    weight_dtypes: tuple[torch.dtype, ...] = ()
    scale_dtypes: tuple[torch.dtype, ...] = ()
    is_divisor: bool = False  # the global scales are stored as 1 / g
    act_format: str = ""  # of activations that the model was made for, if not the weights'

    @property
    def optional(self) -> set[str]:
        return {self.bias, self.input_scale}

    def suffixes(self) -> dict[str, str]:
        """kind -> suffix, of what exists in this scheme."""
        return {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind)}


FP4 = {"weight_dtypes": (torch.uint8, torch.int8)}
FP8 = {"weight_dtypes": (E4M3,)}
PACKED = {"weight": "weight_packed", "scale": "weight_scale"}
SCHEMES = (
    Scheme(
        "ModelOpt NVFP4", "nvfp4", scale="weight_scale", global_scale="weight_scale_2", input_scale="input_scale",
        scale_dtypes=(E4M3,), **FP4,
    ),
    Scheme(
        "compressed-tensors NVFP4", "nvfp4", **PACKED, global_scale="weight_global_scale",
        input_scale="input_global_scale", scale_dtypes=(E4M3,), is_divisor=True, **FP4,
    ),
    Scheme("compressed-tensors MXFP4", "mxfp4", **PACKED, scale_dtypes=(torch.uint8, E8M0), **FP4),
    Scheme("DeepSeek MXFP4", "mxfp4", scale="scale", scale_dtypes=(E8M0,), **FP4),
    Scheme("MXFP8", "mxfp8", scale="weight_scale", scale_dtypes=(torch.uint8, E8M0), **FP8),
    Scheme("MXFP8", "mxfp8", scale="weight_scale_inv", scale_dtypes=(torch.uint8, E8M0), **FP8),
    # A multiplier, in spite of its name.
    Scheme("DeepSeek FP8", "fp8_block", scale="weight_scale_inv", scale_dtypes=FLOAT_SCALES, **FP8),
    Scheme("DeepSeek FP8", "fp8_block", scale="scale", scale_dtypes=(*FLOAT_SCALES, E8M0), **FP8),
    Scheme("compressed-tensors FP8", "fp8_block", scale="weight_scale", scale_dtypes=FLOAT_SCALES, **FP8),
    Scheme(
        "compressed-tensors INT8", "int8", scale="weight_scale", scale_dtypes=FLOAT_SCALES,
        weight_dtypes=(torch.int8,),
    ),
    Scheme("bfloat16", "bf16", weight_dtypes=(torch.bfloat16,)),
    Scheme("float16", "fp16", weight_dtypes=(torch.float16,)),
)  # fmt: skip
GPT_OSS = Scheme(
    "gpt-oss MXFP4",
    "mxfp4",
    weight="blocks",
    scale="scales",
    weight_dtypes=(torch.uint8,),
    scale_dtypes=(torch.uint8,),
    act_format="bf16",
)


class Reader(Protocol):
    """The tensors of a layer's experts in the dtypes that the ops take."""

    scheme: Scheme
    num_experts: int
    kinds: frozenset[str]  # what this checkpoint has, of all experts and projections alike

    def read(self, expert: int, projection: str, kind: str) -> Tensor:
        """[rows, k / pack] codes, [rows, k blocks] scale, one global_scale or input_scale, or [rows] bias."""

    def name(self, expert: int, projection: str, kind: str) -> str:
        """The tensor's name in the checkpoint, for errors."""


def find_reader(checkpoint: Checkpoint, prefix: str) -> Reader:
    """The reader for what lies under `prefix`, or a one-line error that says what does."""
    prefix = prefix.removesuffix(".")
    names = [name.removeprefix(f"{prefix}.") for name in checkpoint.names(f"{prefix}.")]
    if not names:
        refuse(OP, "prefix", "the name in front of the experts' tensors, like model.layers.3.mlp.experts", prefix)
    if f"{prefix}.gate_up_proj_blocks" in checkpoint:
        return GptOss(checkpoint, prefix)
    return Separate(checkpoint, prefix, names)


class Separate:
    """`{prefix}.{expert}.{projection}.{suffix}`"""

    def __init__(self, checkpoint: Checkpoint, prefix: str, names: list[str]) -> None:
        self.checkpoint, self.prefix = checkpoint, prefix
        experts = {name.split(".")[0] for name in names}
        others = sorted(name for name in experts if not re.fullmatch("0|[1-9][0-9]{0,8}", name))
        if others:
            refuse(OP, prefix, "experts 0, 1, 2, ... or gpt-oss's gate_up_proj_blocks", ", ".join(others[:4]))
        last = max(map(int, experts))
        missing = [str(n) for n in itertools.islice((n for n in range(last) if str(n) not in experts), 4)]
        if missing:
            refuse(OP, prefix, f"experts 0 to {last}", f"none of {', '.join(missing)}")
        self.num_experts = len(experts)
        self.projections = self._find_projections(set(names))
        self.scheme = self._find_scheme()
        found = {name.rpartition(".")[2] for name in names}
        self.kinds = frozenset(kind for kind, suffix in self.scheme.suffixes().items() if suffix in found)
        _refuse_unknown(self)

    def name(self, expert: int, projection: str, kind: str) -> str:
        return f"{self.prefix}.{expert}.{self.projections[projection]}.{getattr(self.scheme, kind)}"

    def read(self, expert: int, projection: str, kind: str) -> Tensor:
        name = self.name(expert, projection, kind)
        if name not in self.checkpoint:
            refuse(OP, name, "a tensor, as other experts have it", "none")
        return _as_the_ops_take_it(self.checkpoint.read(name), kind, self.scheme)

    def _find_projections(self, names: set[str]) -> dict[str, str]:
        for projections in PROJECTIONS:
            if any(name.startswith(f"0.{projections[0]}.") for name in names):
                return dict(zip(GATE_UP_DOWN, projections, strict=True))
        expected = " or ".join(", ".join(projections) for projections in PROJECTIONS)
        refuse(
            OP,
            f"{self.prefix}.0",
            expected,
            ", ".join(sorted({name.partition(".")[2].partition(".")[0] or name for name in names})),
        )

    def _find_scheme(self) -> Scheme:
        """The one whose suffixes are those of expert 0's gate and whose dtypes and scale shape fit."""
        start = f"{self.prefix}.0.{self.projections['gate']}."
        tensors = {name.removeprefix(start): self.checkpoint.read(name) for name in self.checkpoint.names(start)}
        for scheme in SCHEMES:
            needed = set(scheme.suffixes().values()) - scheme.optional
            if needed <= set(tensors) and self._fits(scheme, tensors):
                return scheme
        self._refuse_scheme(tensors)

    def _fits(self, scheme: Scheme, tensors: dict[str, Tensor]) -> bool:
        weight, fmt = tensors[scheme.weight], FORMATS[scheme.format]
        if weight.dtype not in scheme.weight_dtypes or weight.dim() != 2:
            return False
        if not scheme.scale:
            return len(set(tensors) - scheme.optional) == 1
        scale = tensors[scheme.scale]
        rows, columns = weight.shape
        return scale.dtype in scheme.scale_dtypes and scale.shape == fmt.weight_scale_shape(rows, columns * fmt.pack)

    def _refuse_scheme(self, tensors: dict[str, Tensor]) -> NoReturn:
        found = ", ".join(f"{suffix} {_facts(tensor)}" for suffix, tensor in sorted(tensors.items()))
        known = ", ".join(dict.fromkeys(scheme.name for scheme in SCHEMES))
        refuse(OP, f"{self.prefix}.0.{self.projections['gate']}", f"tensors of {known}", found)


class GptOss:
    """`{prefix}.gate_up_proj_blocks` uint8 [E, 2I, H / 32, 16], `_scales` [E, 2I, H / 32], `_bias` [E, 2I]; the same of
    `down_proj`. Gate rows are the even ones."""

    scheme = GPT_OSS
    kinds = frozenset(GPT_OSS.suffixes())

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.checkpoint, self.prefix = checkpoint, prefix
        shapes = {name: checkpoint.shape(name) for name in checkpoint.names(f"{prefix}.")}
        first = f"{prefix}.gate_up_proj_blocks"
        self.num_experts = (shapes[first] or (0,))[0]
        _refuse_unknown(self)
        for name, shape in shapes.items():
            suffix = name.rpartition("_")[2]
            dims = {"blocks": "[E, rows, K / 32, 16]", "scales": "[E, rows, K / 32]", "bias": "[E, rows]"}[suffix]
            if (
                len(shape) != dims.count(",") + 1
                or shape[0] != self.num_experts
                or (suffix == "blocks" and shape[3] != 16)
            ):
                refuse(OP, name, dims.replace("E", str(self.num_experts), 1), list(shape))

    def name(self, expert: int, projection: str, kind: str) -> str:
        matrix = "down_proj" if projection == "down" else "gate_up_proj"
        return f"{self.prefix}.{matrix}_{getattr(self.scheme, kind)}"

    def read(self, expert: int, projection: str, kind: str) -> Tensor:
        name = self.name(expert, projection, kind)
        if name not in self.checkpoint:
            refuse(OP, name, "a tensor, as gpt-oss MXFP4 experts have it", "none")
        tensor = self.checkpoint.read(name, expert)
        if kind == "weight":
            tensor = tensor.flatten(1)  # [rows, k / 32, 16] bytes -> [rows, k / 2]
        if projection != "down":
            tensor = tensor[GATE_UP_DOWN.index(projection) :: 2]
        return _as_the_ops_take_it(tensor, kind, self.scheme)


def _refuse_unknown(reader: Separate | GptOss) -> None:
    """Every tensor under the prefix has a meaning, for every expert."""
    each = itertools.product(range(reader.num_experts), GATE_UP_DOWN, reader.scheme.suffixes())
    known = {reader.name(*what) for what in each}
    for name in reader.checkpoint.names(f"{reader.prefix}."):
        if name not in known:
            got = _facts(reader.checkpoint.read(name))
            refuse(OP, name, f"no such tensor in a {reader.scheme.name} checkpoint", got)


def _as_the_ops_take_it(tensor: Tensor, kind: str, scheme: Scheme) -> Tensor:
    """The same bits under the dtype the ops know, scales in theirs (exact), global scales as multipliers.

    What has a dtype that the scheme does not know stays as it is, for the caller to refuse.
    """
    fmt: Format = FORMATS[scheme.format]
    if kind == "weight" and tensor.dtype in scheme.weight_dtypes:
        return tensor.view(torch.uint8) if fmt.pack == 2 else tensor
    if kind == "scale" and tensor.dtype in scheme.scale_dtypes:
        return tensor.view(E8M0) if tensor.dtype == torch.uint8 else tensor.to(fmt.scale_dtype)
    if kind in ("global_scale", "input_scale"):
        return tensor.float().reciprocal() if scheme.is_divisor else tensor.float()
    return tensor


def _facts(tensor: Tensor) -> str:
    return describe(tensor.dtype, tensor.shape, tensor.device).removesuffix(f" on {tensor.device}")
