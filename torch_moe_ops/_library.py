"""The one Library("moe", "DEF"): schemas, overloads, fakes and Python kernels of every op.

For op X the schema comes from ops/X.py, checks and fake from meta_kernels/X.py, the reference from reference/X.py, the
portable GPU kernel from triton/X.py and the CUDA kernels from the shared library _C.so, which registers them under the
same names (`moe::X.cuda`) and may be absent. Where it has a GEMM and no fused layer for a GPU, fused_moe is its stages.

    default    checks, then the backend that `backends.select` names. With kernels for SM90, fused_moe's for CUDA is in
               C++: it checks and runs what they take, and asks this for the rest (`choose_fused_moe`)
    reference  plain torch, on any device
    the rest   one overload per backend; called by name, they check their arguments first too
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import threading
import traceback
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path
from types import ModuleType

import torch
from torch import library

from .backends import CANDIDATES, OPS, Problem, built_backends, compute_capability, select
from .meta_kernels._check import expect_no_grad, refuse, stand_in, static_facts
from .stages import Stages, fused_moe

LIBRARY = library.Library("moe", "DEF")
SHARED_LIBRARY = Path(__file__).with_name("_C.so")

# Scales may come in any strides, and packed ones in particular strides: Inductor must hand them over as they are.
READS_STRIDED_SCALES = ("grouped_gemm", "fused_moe", "pack_scale", "unpack_scale")

# Families whose fused_moe is the stages, one after another.
STAGED = ("cutlass_sm100", "cutlass_sm120")

# Sets of static facts that `default` of an op remembers, about 2 KiB each: every number of tokens of a few layers.
REMEMBERED_CALLS = 4096

# Thread -> what _answer has to say there: of a thread that is not Python's nothing else lasts from call to call.
_WHY_NOT: dict[int, str] = {}


def _module(layer: str, op: str) -> ModuleType:
    return importlib.import_module(f".{layer}.{op}", __package__)


def _overload(op: str, name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops.moe, op), name)


@cache
def _kernel(op: str, backend: str, device: torch.device) -> Callable:
    """A backend's kernel for tensors of this device, with nothing in front of it, below autograd."""
    if backend not in built_backends(op, device.type):
        refuse(op, "backend", f"one with a kernel for {device.type} tensors", backend)
    overload = _overload(op, backend)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, torch._C._dispatch_key_for_device(device.type)))

    def kernel(*args, **options):
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys, *args, **options)

    return kernel


def _schema(op: str) -> str:
    return " ".join(_module("ops", op).SCHEMA.split())


def _define(op: str) -> None:
    """The schema of ops/X.py, once for `default` and once per backend."""
    tags = [torch.Tag.pt2_compliant_tag]
    if op in READS_STRIDED_SCALES:
        tags.append(torch.Tag.needs_exact_strides)
    for name in (op, *(f"{op}.{backend}" for backend in CANDIDATES[op])):
        LIBRARY.define(f"{name}{_schema(op)}", tags=tags)


def _checked(op: str, function: Callable) -> Callable:
    """`function`, behind a look for gradients to record and for tensors left out: the dispatcher lets None pass."""
    arguments, names = _overload(op, "default")._schema.arguments, _argument_names(op)
    tensors = [(i, argument.name) for i, argument in enumerate(arguments) if str(argument.type) == "Tensor"]

    def checked(*args, **options):
        if torch.is_grad_enabled():
            expect_no_grad(op, names, args, options)
        for i, name in tensors:
            if args[i] is None:
                refuse(op, name, "a tensor", None)
        return function(*args, **options)

    return checked


def _register_fakes(op: str) -> None:
    fake = _checked(op, _module("meta_kernels", op).fake)
    for name in (op, *(f"{op}.{backend}" for backend in CANDIDATES[op])):
        library.register_fake(f"moe::{name}", fake, lib=LIBRARY)


def _register_default(op: str) -> None:
    """Checks, chooses, calls: the chosen backend's kernel, where nothing is checked again.

    Checks and choice read nothing but the static facts of the arguments, so they run once for each set of facts (the
    number of tokens is one of them) and are remembered. A refusal is never remembered.
    """
    check, facts = _checked(op, _module("meta_kernels", op).check), _module("ops", op).facts
    names = _argument_names(op)

    @lru_cache(maxsize=REMEMBERED_CALLS)
    def choose(arg_facts: tuple, option_names: tuple[str, ...], option_facts: tuple) -> Callable:
        args = [stand_in(value) for value in arg_facts]
        options = dict(zip(option_names, map(stand_in, option_facts), strict=True))
        check(*args, **options)
        device = args[0].device
        problem = Problem(
            op, device.type, compute_capability(device), built_backends(op, device.type), **facts(*args, **options)
        )
        return _kernel(op, select(problem), device)

    def default(*args, **options):
        if torch.is_grad_enabled():
            expect_no_grad(op, names, args, options)
        kernel = choose(tuple(map(static_facts, args)), tuple(options), tuple(map(static_facts, options.values())))
        return kernel(*args, **options)

    LIBRARY.impl(op, default, "CPU")
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"moe::{op}", "CUDA"):
        _register_choose(op, default)
    else:
        LIBRARY.impl(op, default, "CUDA")


def _register_choose(op: str, default: Callable) -> None:
    """`default` for the shared library's own. Strings come as tensors of their bytes: libtorch would leak them."""
    texts = [argument.name for argument in _overload(op, "default")._schema.arguments if str(argument.type) == "str"]

    def choose(*args, **options) -> torch.Tensor | None:
        strings = {name: bytes(options[name].tolist()).decode() for name in texts}
        return _answer(default, *args, **options | strings)

    schema = re.sub('str (.*?)=".*?"', r"Tensor \1", _schema(op))
    LIBRARY.define(f"choose_{op}{schema}?")
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(f"choose_{op}", choose, key)
    for schema, kernel in (
        ("why_not() -> str", _why_not),
        ("any_requires_grad(Tensor[] tensors) -> bool", _any_requires_grad),
    ):
        LIBRARY.impl(LIBRARY.define(schema), kernel, "CompositeExplicitAutograd")


def _answer(function: Callable, *args, **options) -> torch.Tensor | None:
    """What `function` returns, or None: the shared library's calls let no exception through. `_why_not` has it."""
    try:
        return function(*args, **options)
    except RuntimeError as error:
        _WHY_NOT[threading.get_ident()] = str(error)
    except KeyboardInterrupt:
        _WHY_NOT[threading.get_ident()] = "interrupted"  # the shared library raises the signal again
    except BaseException:  # not foreseen, so where it happened is worth knowing
        _WHY_NOT[threading.get_ident()] = traceback.format_exc()
    return None


def _why_not() -> str:
    return _WHY_NOT.pop(threading.get_ident())


def _any_requires_grad(tensors: list[torch.Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def _define_with_tactic(op: str) -> None:
    """`moe::{op}_with_tactic(tactic, ...)`, for benchmarks/tune.py: the SM90 kernel with that one ("": it chooses)."""
    LIBRARY.define(f"{op}_with_tactic(str tactic, {_schema(op).removeprefix('(')}")


def _register_backend(op: str, backend: str) -> None:
    """What runs when a backend is called by name: the same checks, in front of its kernel.

    At the key BackendSelect, which all calls pass. Inference mode, tensors made there and the bodies of custom ops pass
    autograd by.
    """
    check = _checked(op, _module("meta_kernels", op).check)

    def by_name(*args, **options):
        check(*args, **options)
        return _kernel(op, backend, args[0].device)(*args, **options)

    LIBRARY.impl(f"{op}.{backend}", by_name, "BackendSelect")


def _register_triton(op: str) -> None:
    """triton/X.py for CUDA tensors, and for CPU tensors under Triton's interpreter. Imported at the first call."""
    if importlib.util.find_spec("triton") is None:
        return

    def kernel(*args, **options):
        return getattr(_module("triton", op), op)(*args, **options)

    LIBRARY.impl(f"{op}.triton", kernel, "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        LIBRARY.impl(f"{op}.triton", kernel, "CPU")


def _register_stages(backend: str) -> None:
    """fused_moe of a backend that has kernels of its own for the GEMMs only."""
    if torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"moe::grouped_gemm.{backend}", "CUDA"):
        backends = {op: backend if op == "grouped_gemm" else "cuda" for op in Stages._fields if op in OPS}
        kernels = {op: _kernel(op, backends[op], torch.device("cuda")) for op in backends}
        LIBRARY.impl(f"fused_moe.{backend}", partial(fused_moe, Stages(**kernels, backend=backend)), "CUDA")


def _argument_names(op: str) -> list[str]:
    return [argument.name for argument in _overload(op, "default")._schema.arguments]


for _op in OPS:
    _define(_op)
if SHARED_LIBRARY.exists():
    torch.ops.load_library(str(SHARED_LIBRARY))
for _op in OPS:
    _register_fakes(_op)
    _register_default(_op)
    LIBRARY.impl(f"{_op}.reference", getattr(_module("reference", _op), _op), "CompositeExplicitAutograd")
    _register_triton(_op)
    for _backend in CANDIDATES[_op]:
        _register_backend(_op, _backend)
_define_with_tactic("fused_moe")
for _backend in STAGED:
    _register_stages(_backend)
