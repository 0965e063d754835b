"""cutlass_sm90 gives the same bits with every tactic that moe::fused_moe_with_tactic (for benchmarks/tune.py) takes."""

from __future__ import annotations

import re

import pytest
import torch
from gpu_layers import BF16_LAYOUT, ROUNDED, W4A8, layer, overload, with_tactic

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TILES = ("split64", "split128", "gated64", "gated128", "gathered128")


@pytest.mark.parametrize("num_tokens", [1, 33, 700])
def test_the_same_bits(sm90_product: str, num_tokens: int) -> None:
    call = layer(sm90_product, num_tokens)
    expected = call(overload("cutlass_sm90"))
    tiles = TILES[:3] if sm90_product == W4A8 else (*TILES, "gated32") if sm90_product in BF16_LAYOUT else TILES
    if sm90_product in ROUNDED:
        tiles = tuple(name for name in tiles if not name.endswith("128") or name == "split128")
    if num_tokens == 700:  # too many slots for split tiles
        tiles = tiles[2:]
    alone = [f"{name}+gemm2" for name in tiles if not name.startswith("split")]
    for tactic in ("", *tiles, *alone):
        assert torch.equal(with_tactic(call, tactic), expected), tactic


@pytest.mark.parametrize("tactic", ["split64+gemm2", "gated256", "gated32"])
def test_impossible_tactics_are_refused(sm90_product: str, tactic: str) -> None:
    if tactic == "gated32" and sm90_product in BF16_LAYOUT:
        return
    possible = "split64, split128, gated32, gated32" if sm90_product in BF16_LAYOUT else "split64, split128, gated64"
    last = "gated64" if sm90_product in (W4A8, *ROUNDED) else "gathered128"
    message = rf"fused_moe: tactic: expected one of {possible}[^\n]*{last}\+gemm2, got {re.escape(tactic)}$"
    with pytest.raises(RuntimeError, match=message):
        with_tactic(layer(sm90_product, 8), tactic)
