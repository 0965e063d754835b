"""act_mul against the formulas of docs/ops.md in Python's float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import torch_moe_ops as moe
from torch_moe_ops.activations import ACTIVATIONS
from torch_moe_ops.formats import FORMATS

P, I = 9, 96  # noqa: E741


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def clamp(x: float, limit: float) -> float:
    return max(-limit, min(x, limit))


GATED: dict[str, tuple[dict[str, float], Callable[[float, float], float]]] = {
    "silu": ({}, lambda g, u: u * g * sigmoid(g)),
    "silu with limit": ({"limit": 0.8}, lambda g, u: clamp(u, 0.8) * min(g, 0.8) * sigmoid(min(g, 0.8))),
    "silu of gpt-oss": (
        {"alpha": 1.702, "beta": 1.0, "limit": 1.5},
        lambda g, u: (clamp(u, 1.5) + 1) * min(g, 1.5) * sigmoid(1.702 * min(g, 1.5)),
    ),
    "gelu": ({}, lambda g, u: gelu(g) * u),
    "gelu_tanh": ({}, lambda g, u: 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u),
    "relu": ({}, lambda g, u: max(g, 0.0) * u),
    "swiglustep": ({"limit": 0.7}, lambda g, u: min(g * sigmoid(g), 0.7) * clamp(u, 0.7)),
}
NOT_GATED: dict[str, Callable[[float], float]] = {
    "relu2_no_mul": lambda x: max(x, 0.0) ** 2,
    "gelu_no_mul": gelu,
    "silu_no_mul": lambda x: x * sigmoid(x),
}


def offsets(rows: int = P) -> torch.Tensor:
    return torch.tensor([0, 2, 2, rows]).int()


def act_in_float(x: torch.Tensor, **options: object) -> torch.Tensor:
    """act_mul with its rounding to bfloat16 left in."""
    act, scale = moe.act_mul(x, offsets(), format="bf16", **options)
    assert act.dtype == torch.bfloat16 and scale.shape == (P, 0)
    return act.float()


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "interleaved"])
def test_gated(name: str, layout: str) -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(2, P, I) * 2
    options, formula = GATED[name]
    x = {
        "gate_up": torch.cat([gate, up], 1),
        "up_gate": torch.cat([up, gate], 1),
        "interleaved": torch.stack([gate, up], 2).flatten(1),
    }[layout]
    y = torch.tensor(
        [[formula(*pair) for pair in zip(*row, strict=True)] for row in zip(gate.tolist(), up.tolist(), strict=True)]
    )
    got = act_in_float(x, activation=name.split()[0], layout=layout, **options)
    torch.testing.assert_close(got, y, rtol=2**-8, atol=1e-6)  # half a bfloat16 ulp, and float32 cancellation near 0


@pytest.mark.parametrize("name", NOT_GATED)
def test_not_gated(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(P, I) * 2
    y = torch.tensor([[NOT_GATED[name](value) for value in row] for row in x.tolist()])
    torch.testing.assert_close(act_in_float(x, activation=name), y, rtol=2**-8, atol=1e-6)


def test_every_format(format: str) -> None:
    """The result is quantize() of the float32 activation; for fp8_block the scale is MN-major."""
    torch.manual_seed(0)
    fmt = FORMATS[format]
    gate, up = torch.randn(2, P, I).to(torch.float16 if format == "fp16" else torch.bfloat16)
    act, scale = moe.act_mul(torch.cat([gate, up], 1), offsets(), format=format)
    y = (up.float() + 0.0) * (gate.float() * torch.sigmoid(gate.double()).float())
    values, row_scale = moe.quantize(y, format)
    assert torch.equal(act.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(scale.float(), row_scale.float())
    columns = fmt.act_scale_shape(P, I)[1]
    assert scale.stride() == ((1, 12) if format == "fp8_block" else (max(columns, 1), 1))


def test_global_scale_per_expert() -> None:
    torch.manual_seed(0)
    x = torch.randn(P, 2 * I).bfloat16()
    per_expert = torch.tensor([0.01, 5.0, 0.3])
    act, scale = moe.act_mul(x, offsets(), format="nvfp4", global_scale=per_expert)
    for rows, expert in ((slice(0, 2), 0), (slice(2, P), 2)):
        one, one_scale = moe.act_mul(x, offsets(), format="nvfp4", global_scale=per_expert[expert].reshape(1))
        assert torch.equal(act[rows], one[rows])
        assert torch.equal(scale[rows].float(), one_scale[rows].float())


def test_float32_input_and_no_rows(format: str) -> None:
    act, scale = moe.act_mul(torch.empty(0, 2 * I), torch.zeros(4, dtype=torch.int32), format=format)
    assert act.shape == (0, I // FORMATS[format].pack) and act.dtype == FORMATS[format].dtype and len(scale) == 0


@pytest.mark.parametrize("columns", [7, 50, 96])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_row_depends_on_itself_alone(name: str, columns: int) -> None:
    """Also one row, whose gate is contiguous, and the last values of the tensor, which torch takes one by one."""
    gate_up = torch.randn(101, (1 + ACTIVATIONS[name].gated) * columns)
    options = {"activation": name, "format": "int8"} | ({"limit": 1.0} if ACTIVATIONS[name].needs_limit else {})
    values, scale = moe.act_mul(gate_up, torch.tensor([0, 101]).int(), **options)
    for row in range(101):
        alone = moe.act_mul(gate_up[row : row + 1], torch.tensor([0, 1]).int(), **options)
        assert torch.equal(alone[0][0], values[row]) and torch.equal(alone[1][0], scale[row])


def test_unused_rows_reach_nobody() -> None:
    x = torch.randn(P, 2 * I).bfloat16()
    clean, _ = moe.act_mul(x, offsets(5), format="int8")
    x[5:] = float("nan")
    poisoned, _ = moe.act_mul(x, offsets(5), format="int8")
    assert torch.equal(clean[:5], poisoned[:5])
