"""Operands of grouped_gemm in any pair of formats, made so that float32 sums of their products are exact.

Values are multiples of 1/2 up to 6 and scales powers of two from 1/4 to 4, a product of two scaled values a multiple of
2^-6 below 2^10: sums of 256 of them take 24 bits. Whoever multiplies and adds them in whatever order gets the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_moe_ops.backends import GEMM_FORMATS
from torch_moe_ops.formats import FORMATS, Format, encode_e8m0

COMBINATIONS = [(format, act) for format, acts in GEMM_FORMATS["triton"].items() for act in acts]
MAX_K = 256


class Operands:
    """a [rows, k], b [E, n, k] and their scales as `arguments` and `options` of grouped_gemm; `product` in float64.

    Rows that belong to no expert are poisoned: NaN where the format has it, in values or in scales.
    """

    def __init__(
        self, format: str, act_format: str, offsets: list[int], rows: int, n: int, k: int, *,
        expert_rows: list[int] | None = None, parts: int = 1, seed: int = 0, device: str = "cpu",
    ) -> None:  # fmt: skip
        assert k <= MAX_K
        generator = torch.Generator(device).manual_seed(seed)
        experts, weights, acts = len(offsets) - 1, FORMATS[format], FORMATS[act_format]
        a, a_scale = _random(acts, (rows, k), acts.act_scale_shape(rows, k), generator)
        b, b_scale = _random(weights, (experts, n, k), (experts, *weights.weight_scale_shape(n, k, parts)), generator)
        a_global = _powers_of_two((experts,), generator) if acts.has_global_scale else None
        b_global = _powers_of_two((experts, parts), generator) if weights.has_global_scale else None
        if b_global is not None:
            b_global[:, -1] *= 16  # up's, say, differs from gate's
        bias = torch.randint(-8, 9, (experts, n), generator=generator, device=device).to(torch.bfloat16)
        ends = offsets[1:] if expert_rows is None else [o + r for o, r in zip(offsets, expert_rows, strict=False)]
        self.ranges = [range(first, end) for first, end in zip(offsets, ends, strict=False)]
        self.product = torch.full((rows, n), float("nan"), dtype=torch.float64, device=device)
        for e, used in enumerate(self.ranges):
            used = slice(used.start, used.stop)
            x = _dequantised(acts, a[used], a_scale[used], acts.act_block, None if a_global is None else a_global[e])
            y = _dequantised(
                weights, b[e], b_scale[e], weights.weight_block, None if b_global is None else b_global[e], parts
            )
            self.product[used] = x @ y.T + bias[e].double()
        self._poison(acts, a, a_scale)
        tensors = {"a_scale": a_scale, "b_scale": b_scale, "a_global_scale": a_global, "b_global_scale": b_global}
        tensors["expert_rows"] = None if expert_rows is None else torch.tensor(expert_rows).int().to(device)
        for name, fmt in (("a_scale", acts), ("b_scale", weights)):
            tensors[name] = tensors[name] if fmt.has_scale else None
        self.arguments = (a, b, torch.tensor(offsets, dtype=torch.int32, device=device))
        self.options = {name: tensor for name, tensor in tensors.items() if tensor is not None} | {
            "bias": bias, "format": format, "act_format": act_format, "b_parts": parts, "out_dtype": torch.float32
        }  # fmt: skip

    def _poison(self, acts: Format, a: Tensor, a_scale: Tensor) -> None:
        """NaN into the rows of a that no expert has."""
        ends = [0, *(used.stop for used in self.ranges)]
        starts = [*(used.start for used in self.ranges), len(a)]
        for gap in map(slice, ends, starts):
            for tensor in (a, a_scale) if acts.dtype.is_floating_point else (a_scale,):
                tensor[gap] = torch.full(tensor[gap].shape, float("nan"), device=a.device).to(tensor.dtype)

    def check(self, out: Tensor) -> None:
        """The rows in use are exactly the product."""
        used = ~self.product.isnan()[:, 0]
        assert out.shape == self.product.shape and out.dtype == torch.float32
        assert torch.equal(out[used], self.product[used].float())


def _random(
    fmt: Format, shape: tuple[int, ...], scale_shape: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    device = generator.device
    if fmt.pack == 2:
        packed_shape = (*shape[:-1], shape[-1] // 2)
        values = torch.randint(0, 256, packed_shape, generator=generator, device=device, dtype=torch.uint8)
    else:
        values = torch.randint(-4, 5, shape, generator=generator, device=device).to(fmt.dtype)
    scale = _powers_of_two(scale_shape, generator)
    return values, encode_e8m0(scale) if fmt.scale_dtype == torch.float8_e8m0fnu else scale.to(fmt.scale_dtype)


def _powers_of_two(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator, device=generator.device).float().exp2()


def _dequantised(fmt: Format, values: Tensor, scale: Tensor, block: object, *how: object) -> Tensor:
    return fmt.dequantize(values, scale, block, *how).double()
