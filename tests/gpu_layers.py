"""Layers on a GPU for the tests of fused_moe's backends, and what changes them."""

from __future__ import annotations

import torch
from moe_cases import Call, make_moe
from torch import Tensor

import torch_moe_ops as moe

DEVICE = "cuda"
# A product is a format, or weights x activations. Packed weights are multiplied by cutlass_sm90 alone, these by bf16
# activations.
PACKED = ("nvfp4", "mxfp4", "mxfp8")
W4A8 = "mxfp4 x fp8_block"
# Activations that are quantised and multiplied as bf16 (test_rounded_acts.py has all).
W4A4, MXFP4_MXFP8 = "nvfp4 x nvfp4", "mxfp4 x mxfp8"
ROUNDED = (W4A4, MXFP4_MXFP8)
BF16_LAYOUT = (*PACKED, *ROUNDED)
# cutlass_sm90 takes split tiles up to about a dozen tokens; then gated tiles. From 385 tokens on GEMM1 gathers its
# tokens. (test_tactics.py names every tactic.)
LAYER = {"hidden_size": 1024, "intermediate_size": 512, "num_experts": 64, "top_k": 8}


def why_not(backend: str) -> str | None:
    """Why this machine or build does not have the backend."""
    return next(v.reason for v in moe.explain("fused_moe", device=DEVICE).verdicts if v.backend == backend)


def overload(backend: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.moe.fused_moe, backend)


def needs_packing(product: str) -> bool:
    return product in PACKED or " x " in product


def formats_of(product: str) -> dict[str, str]:
    """format and act_format."""
    format, _, act_format = product.partition(" x ")
    return {"format": format, "act_format": act_format or ("bf16" if product in PACKED else "")}


def product_of(call: Call) -> str:
    format, act_format = call.options["format"], call.options["act_format"]
    return format if act_format in ("", "bf16", "fp16") else f"{format} x {act_format}"


def split_tiles(product: str) -> tuple[str, ...]:
    if product in BF16_LAYOUT:
        return "split64", "split128", "split256"
    return ("split64", "split128") if product == W4A8 else ("split32", "split64", "split128")


def possible_tiles(product: str, split: bool = True) -> tuple[str, ...]:
    gated = ("gated64",) if product in (W4A8, *ROUNDED) else ("gated64", "gated128", "gathered128")
    return (*(split_tiles(product) if split else ()), *(("gated32",) if product in BF16_LAYOUT else ()), *gated)


def possible_tactics(product: str, split: bool = True) -> tuple[str, ...]:
    tiles = possible_tiles(product, split)
    return (*tiles, *(f"{name}+gemm2" for name in tiles if not name.startswith("split")))


def layer(product: str, num_tokens: int, **changes: object) -> Call:
    call = make_moe(num_tokens=num_tokens, device=DEVICE, **{**formats_of(product), **LAYER, **changes})
    return packed(call) if needs_packing(product) else call


def packed(call: Call) -> Call:
    x, w13, w2, *routing = call.args
    weights, act_format = {"w13": w13, "w2": w2}, "fp8_block" if product_of(call) == W4A8 else "bf16"
    for name, weight in weights.items():
        scale = call.options[f"{name}_scale"]
        weights[name] = moe.pack_weight(weight, scale, call.options["format"], act_format=act_format)
    return Call(x, *weights.values(), *routing, **(call.options | {"w13_scale": None, "w2_scale": None}))


def tokens(call: Call, index: slice | Tensor) -> Call:
    """The same call for some of its tokens."""
    x, w13, w2, topk_weights, topk_ids = call.args
    return call.but(x[index], w13, w2, topk_weights[index], topk_ids[index])


def with_ids(call: Call, topk_ids: Tensor, **changes: object) -> Call:
    return call.but(*call.args[:4], topk_ids.int(), **changes)


def with_tactic(call: Call, tactic: str) -> Tensor:
    poison_free_memory()
    return call(lambda *args, **options: torch.ops.moe.fused_moe_with_tactic(tactic, *args, **options))


def poison_free_memory() -> None:
    """What torch.empty returns next holds NaN: results may not depend on rows that nobody wrote."""
    if DEVICE == "cuda":
        held = [torch.full((2**size,), float("nan"), device=DEVICE) for size in range(8, 23) for _ in range(4)]
        del held
