"""Op calls as values, random MoE layers in any format, the activations once more, and opcheck for every dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, library
from torch.nn import functional as F

from torch_moe_ops.activations import get_activation
from torch_moe_ops.formats import quantize_weight

# opcheck's schema test compares inputs with operators that these dtypes do not have.
WITHOUT_COMPARISON = {torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2}
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class Call:
    """The arguments of one op call: ``call(op)`` is ``op(*call.args, **call.options)``."""

    def __init__(self, *args: object, **options: object) -> None:
        self.args, self.options = args, options

    def __call__(self, op: Callable, **changes: object) -> object:
        return op(*self.args, **{**self.options, **changes})

    def but(self, *args: object, **changes: object) -> Call:
        """The same call with its first arguments and some options replaced."""
        return Call(*args, *self.args[len(args) :], **{**self.options, **changes})

    def to(self, device: str) -> Call:
        def move(value: object) -> object:
            return value.to(device) if isinstance(value, Tensor) else value

        return Call(*map(move, self.args), **{name: move(value) for name, value in self.options.items()})

    def tensors(self) -> list[Tensor]:
        return [value for value in (*self.args, *self.options.values()) if isinstance(value, Tensor)]


def make_moe(
    format: str = "bf16",
    *,
    act_format: str = "",
    num_tokens: int = 33,
    hidden_size: int = 160,
    intermediate_size: int = 96,
    num_experts: int = 5,
    top_k: int = 2,
    activation: str = "silu",
    bias: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    device: str = "cpu",
    **options: object,
) -> Call:
    """A random fused_moe call; each token's experts differ."""
    random = {"generator": torch.Generator(device).manual_seed(seed), "device": device}

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, **random)

    if dtype is None:
        dtype = torch.float16 if "fp16" in (format, act_format) else torch.bfloat16
    parts = 2 if get_activation("test", activation).gated else 1
    w13 = randn(num_experts, parts * intermediate_size, hidden_size) * hidden_size**-0.5
    w2 = randn(num_experts, hidden_size, intermediate_size) * intermediate_size**-0.5
    w13[:, : intermediate_size // 2] *= 3.0  # blocks and parts of different magnitude show a wrong scale index
    weights = {}
    for name, weight, weight_parts in (("w13", w13, parts), ("w2", w2, 1)):
        weights[name], scale, global_scale = quantize_weight(weight, format, parts=weight_parts)
        options |= {f"{name}_scale": scale, f"{name}_global_scale": global_scale}
        if bias:
            options[f"{name}_bias"] = randn(*weight.shape[:2])
    return Call(
        randn(num_tokens, hidden_size).to(dtype),
        weights["w13"],
        weights["w2"],
        torch.rand((num_tokens, top_k), **random) + 0.1,
        torch.rand((num_tokens, num_experts), **random).argsort(1)[:, :top_k].int().contiguous(),
        format=format,
        act_format=act_format,
        activation=activation,
        **options,
    )


def activate(gate_up: Tensor, activation: str, layout: str, alpha: float, beta: float, limit: float | None) -> Tensor:
    """gate_up [..., 2I] -> [..., I] in float64."""
    x = gate_up.double()
    if activation.endswith("_no_mul"):
        return {"relu2": F.relu(x) ** 2, "gelu": F.gelu(x), "silu": F.silu(x)}[activation.removesuffix("_no_mul")]
    first, second = x.chunk(2, dim=-1) if layout != "interleaved" else (x[..., 0::2], x[..., 1::2])
    gate, up = (second, first) if layout == "up_gate" else (first, second)
    if activation == "swiglustep":
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    if activation == "silu":
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + beta) * gate * torch.sigmoid(alpha * gate)
    functions = {"gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"), "relu": F.relu}
    return functions[activation](gate) * up


def opcheck(op: torch._ops.OpOverload, call: Call) -> None:
    """PyTorch's opcheck, plus: no input changes, no output shares memory with an input."""
    incomparable = any(tensor.dtype in WITHOUT_COMPARISON for tensor in call.tensors())
    library.opcheck(op, call.args, call.options, test_utils=OPCHECKS[incomparable:])
    before = [_bytes(tensor).clone() for tensor in call.tensors()]
    outputs = call(op)
    for tensor, old in zip(call.tensors(), before, strict=True):
        assert torch.equal(_bytes(tensor), old), "an input was changed"
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            storages = output.untyped_storage(), tensor.untyped_storage()
            assert not output.numel() or storages[0].data_ptr() != storages[1].data_ptr(), "an output is an input"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
