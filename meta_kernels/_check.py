"""How arguments are refused: one line, ``op: argument: expected ..., got ...``.

The checks read only static facts and sizes, never values, so they run on fake tensors with symbolic sizes as well as on
a GPU without a synchronisation, and on `TensorFacts`, which stand in for tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

BF16_FP16 = (torch.bfloat16, torch.float16)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)

# What may hold a format's values or scales besides the dtype itself: the same bits under another name.
SAME_BITS = {
    torch.uint8: (torch.uint8, torch.float4_e2m1fn_x2),
    torch.float8_e8m0fnu: (torch.float8_e8m0fnu, torch.uint8),
}


def storage_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes accepted where a format stores `dtype`."""
    return SAME_BITS.get(dtype, (dtype,))


def refuse(op: str, name: str, expected: object, got: object) -> NoReturn:
    raise RuntimeError(f"{op}: {name}: expected {expected}, got {got}")


def expect_choice(op: str, name: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        text = f"one of {', '.join(map(str, choices))}".replace("torch.", "")
        refuse(op, name, text, str(value).replace("torch.", ""))


def expect_range(op: str, name: str, value: int, low: int, high: int | None = None) -> None:
    """low <= value <= high (no upper end if None)."""
    if value < low or (high is not None and value > high):
        refuse(op, name, f"at least {low}" if high is None else f"{low} to {high}", value)


def expect_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: Sequence[int],
    device: torch.device,
    *,
    contiguous: bool = True,
) -> None:
    """One of `dtypes`, exactly this shape, on this device and, unless excused, contiguous."""
    if (
        tensor.dtype not in dtypes
        or tensor.shape != shape
        or tensor.device != device
        or (contiguous and not tensor.is_contiguous())
    ):
        _refuse_tensor(op, name, tensor, dtypes, shape, device, contiguous)


def expect_sizes(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    dims: Sequence[str],
    device: torch.device | None = None,
) -> torch.Size:
    """One of `dtypes`, contiguous, with as many dimensions as there are names in `dims`. Returns the sizes."""
    if (
        tensor.dtype not in dtypes
        or tensor.dim() != len(dims)
        or (device is not None and tensor.device != device)
        or not tensor.is_contiguous()
    ):
        _refuse_tensor(op, name, tensor, dtypes, dims, device or tensor.device, True)
    return tensor.shape


def expect_offsets(op: str, expert_offsets: Tensor, device: torch.device) -> int:
    """int32 [E + 1]. Returns E, at least 1."""
    size = expect_sizes(op, "expert_offsets", expert_offsets, INT32, ("E + 1",), device)[0]
    if size < 2:
        got = describe(expert_offsets.dtype, expert_offsets.shape, expert_offsets.device)
        refuse(op, "expert_offsets", "int32 [E + 1] of at least one expert", got)
    return size - 1


def expect_no_grad(op: str, names: Sequence[str], args: Sequence[object], options: Mapping[str, object]) -> None:
    """Ops are inference-only: a gradient that would silently be lost is refused. `names` are those of `args`."""
    for name, value in (*zip(names, args, strict=False), *options.items()):
        if getattr(value, "requires_grad", False):
            refuse(op, name, "no grad", "requires_grad=True (inference only; use torch.no_grad())")


class TensorFacts(NamedTuple):
    """What the checks read of a tensor, under the names that it has there."""

    dtype: torch.dtype
    shape: torch.Size
    device: torch.device
    strides: tuple[int, ...] | None  # None: contiguous

    def dim(self) -> int:
        return len(self.shape)

    def is_contiguous(self) -> bool:
        return self.strides is None

    def stride(self) -> tuple[int, ...]:
        return self.strides


def static_facts(value: object) -> object:
    """A tensor's `TensorFacts`, as the plain tuple that is quickest to make and to hash; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.dtype, value.shape, value.device, None if value.is_contiguous() else value.stride()


def stand_in(facts: object) -> object:
    """What the checks take in place of the argument that `static_facts` was made from; no op has tuple arguments."""
    return TensorFacts(*facts) if isinstance(facts, tuple) else facts


def describe(dtype: object, shape: Sequence[object], device: torch.device) -> str:
    """``bfloat16 [64, 7168] on cuda:0``"""
    return f"{dtype} [{', '.join(map(str, shape))}] on {device}".replace("torch.", "")


def _refuse_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: Sequence[object],
    device: torch.device,
    contiguous: bool,
) -> NoReturn:
    expected = describe(" or ".join(map(str, dtypes)), shape, device)
    got = describe(tensor.dtype, tensor.shape, tensor.device)
    if contiguous and not tensor.is_contiguous():
        expected, got = f"contiguous {expected}", f"{got} with strides {list(tensor.stride())}"
    refuse(op, name, expected, got)
