"""Backends: which implementation of an op runs, and why.

A backend is an overload of an op (`moe::fused_moe.cutlass_sm90`). The choice is a pure function of a `Problem`, the
static facts of a call: it depends on no tensor value, no number of tokens, no environment variable and no timing.
`CANDIDATES` lists the backends of each op in preference order; each has a predicate that returns None when it can run
the problem, else one sentence that says why not. The first without an objection runs. On a GPU the reference is never
chosen: a problem that no GPU backend takes is an error, not slow code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from numbers import Integral
from typing import NamedTuple

import torch

from .activations import get_activation
from .formats import FORMATS, get_format
from .meta_kernels._check import FLOATS, expect_choice, expect_range, refuse
from .meta_kernels.grouped_gemm import check_formats
from .packed_weights import BLOCK, PACKABLE, PACKED_DTYPES, ROUNDED_ACTS

STAGE = ("cuda", "triton", "reference")
CANDIDATES: dict[str, tuple[str, ...]] = {
    "topk": STAGE,
    "sort_slots": STAGE,
    "quantize": STAGE,
    "permute": STAGE,
    "grouped_gemm": ("cutlass_sm90", "cutlass_sm100", "cutlass_sm120", "cutlass_sm80", "triton", "reference"),
    "act_mul": STAGE,
    "finalize": STAGE,
    "fused_moe": ("cutlass_sm90", "cutlass_sm100", "cutlass_sm120", "triton", "reference"),
    "pack_scale": STAGE,
    "unpack_scale": STAGE,
}
OPS = tuple(CANDIDATES)

# What the GPU backends of the GEMMs multiply: the format of the weights, and those of the activations that go with it.
# The other GPU kernels take every format.
GEMM_OPS = ("grouped_gemm", "fused_moe")
GEMM_FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "cutlass_sm80": {format: (format,) for format in ("bf16", "fp16", "int8")},
    "cutlass_sm90": {format: (format,) for format in ("bf16", "fp16", "fp8_block")}
    | {format: tuple(layouts) for format, layouts in PACKED_DTYPES.items()},
    "cutlass_sm100": {format: (format,) for format in ("bf16", "fp8_block", "mxfp8", "mxfp4", "nvfp4")}
    | {"mxfp4": ("mxfp4", "mxfp8")},
    "cutlass_sm120": {format: (format,) for format in ("fp8_block", "mxfp8", "mxfp4", "nvfp4")}
    | {"mxfp4": ("mxfp4", "mxfp8")},
    "triton": {format: (format,) for format in ("bf16", "fp16")}
    | {format: (format, "bf16", "fp16") for format in ("int8", "fp8_block", "fp8_block_e8m0", "mxfp8")}
    | {
        "mxfp4": ("mxfp4", "mxfp8", "fp8_block", "fp8_block_e8m0", "bf16", "fp16"),
        "nvfp4": ("nvfp4", "fp8_block", "fp8_block_e8m0", "bf16", "fp16"),
    },
}
# What K, and N within a part, of each of an op's GEMMs are called in its documentation.
K_AND_N = {
    "grouped_gemm": (("K", "N of each part"),),
    "fused_moe": (("hidden_size", "intermediate_size"), ("intermediate_size", "hidden_size")),
}


# Nobody has run these kernels yet: docs/blackwell.md.
NOT_EXECUTED = ("cutlass_sm100", "cutlass_sm120")


class Gemm(NamedTuple):
    """A weight [n, k] of an expert, as `parts` equally tall matrices on top of each other."""

    n: int
    k: int
    parts: int = 1


class Problem(NamedTuple):
    """The static facts a backend is chosen from. What the caller of `explain` left open is None or empty."""

    op: str
    device_type: str
    sm: int  # compute capability, 90 for 9.0; 0 off GPUs
    built: frozenset[str]  # the backends that have a kernel for this op on this device type
    format: str = "bf16"
    act_format: str = ""
    activation: str = "silu"
    gemms: tuple[Gemm, ...] = ()
    num_experts: int | None = None
    top_k: int | None = None
    out_dtype: torch.dtype | None = None
    bias_dtype: torch.dtype | None = None
    num_groups: int = 1  # of topk
    packed: bool = False  # the weights are results of pack_weight, for these activations


@dataclass(frozen=True)
class Verdict:
    """What one backend says about a problem; `reason` is None for yes."""

    backend: str
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """The candidates for a problem in preference order; `backend` is the one that runs, None if all refuse."""

    problem: Problem
    verdicts: tuple[Verdict, ...]

    @property
    def backend(self) -> str | None:
        return next((verdict.backend for verdict in self.verdicts if verdict.reason is None), None)

    def __str__(self) -> str:
        p = self.problem
        where = f"{p.device_type} (sm{p.sm})" if p.sm else p.device_type
        formats = p.format if p.act_format in ("", p.format) else f"{p.format} weights, {p.act_format} activations"
        sizes = "".join(f", n {n} k {k}" for n, k, _ in p.gemms)
        lines = [f"{p.op} on {where}, {formats}{sizes}"]
        for verdict in self.verdicts:
            if verdict.reason:
                says = f"no: {verdict.reason}"
            else:
                says = "yes" if verdict.backend == self.backend else f"yes, after {self.backend}"
                says += " (compiled, inspected, not executed)" * (verdict.backend in NOT_EXECUTED)
                says += " (quantises activations, multiplies them as bf16)" * _rounds_acts(p, verdict.backend)
            lines.append(f"  {verdict.backend:<14}{says}")
        return "\n".join(lines)


# ---- predicates: None or one sentence --------------------------------------------------------------------------------


def _reference(p: Problem) -> str | None:
    if p.device_type not in ("cpu", "cuda"):
        return f"there is no backend for {p.device_type} tensors; plain torch runs only when called by name"
    if p.device_type != "cpu":
        return "plain torch; on a GPU it runs only when called by name"
    return None


def _triton(p: Problem) -> str | None:
    if p.device_type == "cpu":
        return "Triton's interpreter is for tests; on a CPU it runs only when called by name"
    return (
        _not_on_gpu(p)
        or _not_built(p, "triton", "the triton package is not installed")
        or _needs_sm(p, range(80, 1000), "sm80 or later")
        or _needs_format(p, "triton")
    )


def _cuda(p: Problem) -> str | None:
    return (
        _not_on_gpu(p)
        or _needs_sm(p, range(80, 1000), "sm80 or later")
        or _not_built(p, "cuda")
        or (_at_most("experts", p.num_experts, 1024) if p.op in ("topk", "sort_slots") else None)
        or (_at_most("experts a token", p.top_k, 32) if p.op == "topk" else None)
        or _at_most("groups", p.num_groups, 32)
    )


def _cutlass_sm80(p: Problem) -> str | None:
    """Later GPUs run its PTX, and it stands behind the kernels made for them."""
    if p.device_type == "cuda" and p.sm == 90:
        return "on sm90 it runs only when called by name"
    return _cutlass(p, "cutlass_sm80", range(80, 1000), "sm80 or later") or _needs_aligned_rows(p)


def _cutlass_sm90(p: Problem) -> str | None:
    return (
        _cutlass(p, "cutlass_sm90", (90,), "sm90")
        or (_needs_whole_blocks(p) if p.packed else _needs_aligned_rows(p, within_parts=True))
        or _at_most("experts", p.num_experts, 1024)
    )


def _cutlass_sm100(p: Problem) -> str | None:
    return _cutlass_blackwell(p, "cutlass_sm100", (100, 103), "sm100 or sm103")


def _cutlass_sm120(p: Problem) -> str | None:
    return _cutlass_blackwell(p, "cutlass_sm120", (120, 121), "sm120 or sm121")


def _cutlass_blackwell(p: Problem, backend: str, sms: tuple[int, ...], text: str) -> str | None:
    """fused_moe is the stages in turn, of which sort_slots has the limit."""
    return (
        _cutlass(p, backend, sms, text)
        or _needs_cutlass_types(p)
        or _needs_aligned_rows(p)
        or (_at_most("experts", p.num_experts, 1024) if p.op == "fused_moe" else None)
    )


PREDICATES: dict[str, Callable[[Problem], str | None]] = {
    "reference": _reference,
    "triton": _triton,
    "cuda": _cuda,
    "cutlass_sm80": _cutlass_sm80,
    "cutlass_sm90": _cutlass_sm90,
    "cutlass_sm100": _cutlass_sm100,
    "cutlass_sm120": _cutlass_sm120,
}


def _cutlass(p: Problem, backend: str, sms: range | tuple[int, ...], text: str) -> str | None:
    return _not_on_gpu(p) or _needs_sm(p, sms, text) or _not_built(p, backend) or _needs_format(p, backend)


def _not_on_gpu(p: Problem) -> str | None:
    return None if p.device_type == "cuda" else f"needs a CUDA device, got {p.device_type}"


def _not_built(p: Problem, backend: str, reason: str = "this build has no such CUDA kernel") -> str | None:
    return None if backend in p.built else reason


def _needs_sm(p: Problem, sms: range | tuple[int, ...], text: str) -> str | None:
    return None if p.sm in sms else f"needs {text}, got sm{p.sm}"


def _at_most(what: str, value: int | None, limit: int) -> str | None:
    return f"takes at most {limit} {what}, got {value}" if value and value > limit else None


def _needs_format(p: Problem, backend: str) -> str | None:
    return _refuses_formats(p.op, backend, p.format, p.act_format, p.packed) if p.op in GEMM_OPS else None


def _refuses_formats(op: str, backend: str, format: str, act_format: str, packed: bool) -> str | None:
    formats, act_format = GEMM_FORMATS[backend], act_format or format
    if format not in formats:
        return f"multiplies {', '.join(formats)}, got {format}"
    acts = formats[format] + _rounded_acts(op, backend, format)
    if act_format not in acts:
        return f"multiplies {format} weights by {' or '.join(acts)} activations, got {act_format}"
    needs_packed = backend == "cutlass_sm90" and format in PACKABLE
    if packed != needs_packed:
        has_layout = act_format != "bf16" and act_format in PACKED_DTYPES.get(format, {})
        option = f'(..., act_format="{act_format}")' if has_layout else ""
        needed = f"packed by pack_weight{option}" if needs_packed else "as they are stored, got packed ones"
        return f"needs weights {needed}"
    return None


def _rounded_acts(op: str, backend: str, format: str) -> tuple[str, ...]:
    """The activations that are quantised and multiplied as the bf16 numbers next to what they stand for."""
    return ROUNDED_ACTS.get(format, ()) if (op, backend) == ("fused_moe", "cutlass_sm90") else ()


def _rounds_acts(p: Problem, backend: str) -> bool:
    return (p.act_format or p.format) in _rounded_acts(p.op, backend, p.format)


def _needs_aligned_rows(p: Problem, within_parts: bool = False) -> str | None:
    """Rows of a and b are read in 16-byte pieces and rows of out written in pieces of 8 values, those of each part of b
    on their own where a kernel's tiles do not cross parts."""
    format = FORMATS[p.format]
    k_multiple = 16 // format.dtype.itemsize * format.pack
    if (p.format, p.act_format) == ("mxfp4", "mxfp8"):
        k_multiple = 128  # 4-bit values that are multiplied by 8-bit ones are spread to bytes, 128 at a time
    for (n, k, parts), (k_name, n_name) in zip(p.gemms, K_AND_N[p.op], strict=False):
        height, height_name = (n // parts, n_name) if within_parts else (n, "N")
        if k % k_multiple or k < 1:
            return f"needs {k_name} to be a multiple of {k_multiple}, got {k}"
        if height % 8:
            return f"needs {height_name} to be a multiple of 8, got {height}"
    return None


def _needs_whole_blocks(p: Problem) -> str | None:
    """Packed weights are blocks, which do not cross parts."""
    for (n, k, parts), names in zip(p.gemms, K_AND_N[p.op], strict=False):
        for size, name in zip((k, n // parts), names, strict=True):
            if size % BLOCK:
                return f"needs {name} to be a multiple of {BLOCK} for packed weights, got {size}"
    return None


def _needs_cutlass_types(p: Problem) -> str | None:
    """CUTLASS's epilogues are instantiated for these, and its scale blocks cannot start anew in the middle of b."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    for name, dtype, taken in (("output", p.out_dtype, (bfloat16, float32)), ("bias", p.bias_dtype, (bfloat16,))):
        if dtype not in (None, *taken):
            return f"needs a {' or '.join(map(str, taken))} {name}, got {dtype}".replace("torch.", "")
    for n, _, parts in p.gemms:
        if p.format == "fp8_block" and parts > 1 and n // parts % 128:
            return f"needs N of each part to be a multiple of 128, got {n // parts}"
    return None


# ---- the choice ------------------------------------------------------------------------------------------------------


def explain_problem(problem: Problem) -> Explanation:
    names = CANDIDATES[problem.op]
    return Explanation(problem, tuple(Verdict(name, PREDICATES[name](problem)) for name in names))


def select(problem: Problem) -> str:
    """The backend that runs the problem, or a one-line error with every backend's reason."""
    explanation = explain_problem(problem)
    if explanation.backend is None:
        reasons = "; ".join(f"{verdict.backend}: {verdict.reason}" for verdict in explanation.verdicts)
        raise RuntimeError(f"{problem.op}: backend: expected one that can run this problem, got none ({reasons})")
    return explanation.backend


def expect_formats(op: str, backend: str, format: str, act_format: str, packed: bool) -> None:
    """Refuses what a backend of a GEMM does not multiply, where it is called by name."""
    if reason := _refuses_formats(op, backend, format, act_format, packed):
        raise RuntimeError(f"{op}: backend: expected one that can run this problem, got {backend} ({reason})")


@cache
def built_backends(op: str, device_type: str) -> frozenset[str]:
    """The backends of an op that have a kernel for this device type. Kernels are registered at import, never later."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return frozenset({"reference"})  # plain torch, for every key
    has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return frozenset(name for name in CANDIDATES[op] if has_kernel(f"moe::{op}.{name}", key))


def compute_capability(device: torch.device) -> int:
    """90 for 9.0; 0 off GPUs."""
    if device.type != "cuda":
        return 0
    return _compute_capability(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _compute_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def explain(
    op: str = "fused_moe",
    *,
    device: str | torch.device | None = None,
    sm: int | None = None,
    format: str = "bf16",
    act_format: str = "",
    activation: str = "silu",
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    n: int | None = None,
    k: int | None = None,
    b_parts: int = 1,
    out_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Explanation:
    """Which backend runs a problem, and what every candidate says about it: ``print(explain(...))``.

    Facts left out raise no objection. Nothing is run.

    Args:
        op: an op of ``torch.ops.moe``.
        device: of the tensors; if absent the current GPU, or the CPU of a machine without one.
        sm: asks about another GPU, with the kernels of this build: 90 for compute capability 9.0.
        format, act_format, activation: as the op takes them.
        hidden_size, intermediate_size, num_experts, top_k: H, I, E and K of fused_moe; H and I together.
        n, k, b_parts: sizes of grouped_gemm's b and its parts; n and k together.
        out_dtype, bias_dtype: of grouped_gemm's result, and of biases.
        packed: whether the weights are results of `pack_weight` for `act_format`.

    Returns:
        The candidates in order of preference, each with what it objects to, or None; the first without runs.

    Raises:
        RuntimeError: ``explain: argument: expected ..., got ...``, or the op's own line for what it would refuse.
    """
    if op not in CANDIDATES:
        raise RuntimeError(f"explain: op: expected one of {', '.join(OPS)}, got {op}")
    get_format(op, format)
    parts = 2 if get_activation(op, activation).gated else 1
    if op in GEMM_OPS:
        pack = max(fmt.pack for fmt in check_formats(op, format, act_format))
        layer, gemm = dict(hidden_size=hidden_size, intermediate_size=intermediate_size), dict(n=n, k=k)
        own, others = (layer, gemm) if op == "fused_moe" else (gemm, layer)
        for name, size in others.items():
            if size is not None:
                refuse(op, name, f"None for {op}", size)
        for name, size in own.items() if set(own.values()) != {None} else ():
            if size is None:
                refuse(op, name, f"a size, since {' and '.join(own)} are given together", None)
            _expect_whole(op, name, size)
            if name != "n" and size % pack:
                refuse(op, name, f"a multiple of {pack} for {format}", size)
    if packed and format not in PACKABLE:
        refuse(op, "packed", f"False for {format}", packed)
    _expect_whole(op, "b_parts", b_parts)
    for name, count in (("num_experts", num_experts), ("top_k", top_k)):
        if count is not None:
            _expect_whole(op, name, count)
    if op == "topk" and num_experts and top_k:
        expect_range(op, "top_k", top_k, 1, num_experts)
    for name, dtype in (("out_dtype", out_dtype), ("bias_dtype", bias_dtype)):
        if dtype is not None:
            expect_choice(op, name, dtype, FLOATS)
    gemms: tuple[Gemm, ...] = ()
    if op == "fused_moe" and hidden_size and intermediate_size:
        gemms = (Gemm(parts * intermediate_size, hidden_size, parts), Gemm(hidden_size, intermediate_size))
    elif op == "grouped_gemm" and n and k:
        if n % b_parts:
            refuse(op, "n", f"a multiple of {b_parts}, which b_parts is", n)
        gemms = (Gemm(n, k, b_parts),)
    if device is None:
        device = "cuda" if sm is not None or torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if sm is not None:
        _expect_whole("explain", "sm", sm, 1 if device.type == "cuda" else 0)
        if sm and device.type != "cuda":
            refuse("explain", "sm", f"none for {device.type}", sm)
    if device.type == "cuda" and sm is None and not torch.cuda.is_available():
        refuse("explain", "device", "cpu, or sm, where there is no CUDA GPU", device)
    sm = compute_capability(device) if sm is None else sm
    built = built_backends(op, device.type)
    facts = (format, act_format, activation, gemms, num_experts, top_k, out_dtype, bias_dtype)
    return explain_problem(Problem(op, device.type, sm, built, *facts, packed=packed))


def _expect_whole(op: str, name: str, value: object, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        refuse(op, name, "a whole number", repr(value))
    expect_range(op, name, value, low)


def explain_choices(format: str, act_formats: Sequence[str], **facts: object) -> list[Explanation]:
    """What each kind of activations gives, for weights as they are stored and packed, up to the choice.

    `act_formats`: the best first. The choice is the first that runs on kernels made for the device and for these
    activations. Then come kernels made for the device that quantise activations and multiply them as bf16, and Triton's
    last: where a CUDA kernel takes other activations as they are, no format is emulated.
    """
    packings = (False, True) if format in PACKABLE else (False,)
    explanations = [
        explain(format=format, act_format=act_format, packed=packed, **facts)
        for act_format, packed in product(act_formats, packings)
    ]

    def rank(answer: Explanation) -> tuple[bool, bool, bool]:
        name = answer.backend
        return name is None, name == "triton", name is not None and _rounds_acts(answer.problem, name)

    choice = min(explanations, key=rank)
    return explanations if choice.backend is None else explanations[: explanations.index(choice) + 1]
