"""Measures what conversions cost and writes it into docs/formats.md: python docs/make_formats.py (seconds, on a CPU).

Weights are normal, [2, 512, 1024], seed 0. Errors are |x' - x| / |x| against the weights as they were stored before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.formats import FORMATS, encode_e8m0, quantize_weight, unpack_e2m1

PAGE = Path(__file__).with_name("formats.md")
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"
STDS = (0.005, 0.01, 0.02, 0.05, 0.5)
NVFP4 = FORMATS["nvfp4"]


def relative_error(approximation: Tensor, x: Tensor) -> float:
    return ((approximation.double() - x.double()).norm() / x.double().norm()).item()


def keep_codes(values: Tensor, scale: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """nvfp4's codes under a power of two for each pair of blocks: the larger scale of the pair, rounded."""
    pairs = scale.unflatten(-1, (-1, 2)).amax(-1)
    return unpack_e2m1(values) * rounding(pairs).repeat_interleave(32, -1)


def measure(std: float) -> dict[str, float]:
    """Row of the table -> error, for weights of this standard deviation."""
    weight = torch.randn(2, 512, 1024, generator=torch.Generator().manual_seed(0)) * std
    values, scale, global_scale = quantize_weight(weight, "nvfp4")
    x = NVFP4.dequantize(values, scale, NVFP4.weight_block, global_scale)
    product = scale.float() * global_scale[..., None]
    fp8, fp8_scale, _ = quantize_weight(weight, "fp8_block")
    powers = torch.exp2(torch.log2(fp8_scale).ceil())
    nvfp4 = {"weight_global_scale": global_scale}

    def down(pairs: Tensor) -> Tensor:
        return torch.exp2(torch.log2(pairs).floor())

    return {
        "bf16 -> nvfp4: `quantize_weight`": relative_error(x, weight),
        "nvfp4 -> mxfp4: `convert_weight`": moe.convert_weight(values, scale, "nvfp4", "mxfp4", **nvfp4).error.item(),
        "the same with the codes kept, scales of pairs rounded up": relative_error(
            keep_codes(values, product, lambda pairs: encode_e8m0(pairs).float()), x
        ),
        "the same with the codes kept, scales of pairs rounded down": relative_error(
            keep_codes(values, product, down), x
        ),
        "nvfp4, global scale into the block scales: `fold_global_scale`": moe.fold_global_scale(
            values, scale, global_scale
        ).error.item(),
        "fp8_block -> mxfp8: `convert_weight`": moe.convert_weight(fp8, fp8_scale, "fp8_block", "mxfp8").error.item(),
        "fp8_block -> mxfp8, scales powers of two": moe.convert_weight(fp8, powers, "fp8_block", "mxfp8").error.item(),
    }


def table() -> str:
    columns = {std: measure(std) for std in STDS}
    rows = [["standard deviation of the weights", *map(str, STDS)], ["---"] * (1 + len(STDS))]
    rows += [[name, *(f"{columns[std][name]:.2g}" for std in STDS)] for name in columns[STDS[0]]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def text() -> str:
    """The page with the table measured anew."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(text())
