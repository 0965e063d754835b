"""act = quantize(activation(gate, up)) for the rows below expert_offsets[-1], in float32.

gate_up [P, 2I] (gated; gate and up by `layout`) or [P, I] (`*_no_mul`) -> act [P, I / pack],
act_scale [P, scale columns] (MN-major for fp8_block).
    silu: (up + beta) * gate * sigmoid(alpha * gate), with gate <= limit and |up| <= limit
    gelu: gelu_erf(gate) * up    gelu_tanh: gelu_tanh(gate) * up    relu: max(gate, 0) * up
    swiglustep: min(silu(gate), limit) * clamp(up, -limit, limit)
    relu2_no_mul: max(x, 0)^2    gelu_no_mul: gelu_erf(x)    silu_no_mul: silu(x)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_moe_ops.activations import get_activation
from torch_moe_ops.formats import FORMATS
from torch_moe_ops.meta_kernels._sizes import empty_act_scale, empty_values
from torch_moe_ops.triton._common import (
    EXACT,
    as_stored,
    block_columns,
    expert_bound,
    load_global_scale,
    on_device,
    quantize_blocks,
    row_tile,
    row_warps,
    store_blocks,
    to_float32,
)


@triton.jit
def _clamp(x, low, high):
    """clamp that keeps NaN, as torch does (tl.minimum and tl.maximum drop it)."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gelu_erf(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _activate(gate, up, alpha, beta, limit, ACTIVATION: tl.constexpr):
    """`up` is ignored by the activations without a product; limit = inf means none."""
    if ACTIVATION == "silu":
        gate = tl.where(gate > limit, limit, gate)
        return (_clamp(up, -limit, limit) + beta) * (gate * _sigmoid(alpha * gate))
    elif ACTIVATION == "gelu":
        return _gelu_erf(gate) * up
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
        return gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    elif ACTIVATION == "relu":
        return tl.where(gate < 0, 0.0, gate) * up
    elif ACTIVATION == "swiglustep":
        silu = gate * _sigmoid(gate)
        return tl.where(silu > limit, limit, silu) * _clamp(up, -limit, limit)
    elif ACTIVATION == "relu2_no_mul":
        relu = tl.where(gate < 0, 0.0, gate)
        return relu * relu
    elif ACTIVATION == "gelu_no_mul":
        return _gelu_erf(gate)
    else:
        tl.static_assert(ACTIVATION == "silu_no_mul")
        return gate * _sigmoid(gate)


@triton.jit(do_not_specialize=["stride_scale_k"])  # of an MN-major scale: it changes with the number of rows
def _act_mul_kernel(
    gate_up_ptr, expert_offsets_ptr, global_scale_ptr, act_ptr, act_scale_ptr, alpha, beta, limit,
    width, intermediate, num_experts, stride_scale_row, stride_scale_k,
    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, EXPERTS: tl.constexpr,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if row >= tl.load(expert_offsets_ptr + num_experts):
        return
    cols = block_columns(chunk, BLOCKS, BLOCK)
    inside = cols < intermediate
    row_ptr = gate_up_ptr + row * width
    if LAYOUT == "none":
        gate = to_float32(tl.load(row_ptr + cols, mask=inside, other=0.0))
        up = gate
    elif LAYOUT == "interleaved":
        gate = to_float32(tl.load(row_ptr + 2 * cols, mask=inside, other=0.0))
        up = to_float32(tl.load(row_ptr + 2 * cols + 1, mask=inside, other=0.0))
    else:
        first = to_float32(tl.load(row_ptr + cols, mask=inside, other=0.0))
        second = to_float32(tl.load(row_ptr + intermediate + cols, mask=inside, other=0.0))
        gate, up = (first, second) if LAYOUT == "gate_up" else (second, first)
    y = _activate(gate, up, alpha, beta, limit, ACTIVATION)
    global_scale = load_global_scale(global_scale_ptr, expert_offsets_ptr, row, num_experts, EXPERTS)
    # Columns past the end hold activation(0, 0) = 0, which leaves the last block's amax alone.
    values, scale = quantize_blocks(y, global_scale, FORMAT, BLOCKS, BLOCK)
    store_blocks(
        values, scale, act_ptr, act_scale_ptr, row, chunk, intermediate, stride_scale_row, stride_scale_k,
        FORMAT, BLOCKS, BLOCK,
    )  # fmt: skip


def act_mul(
    gate_up: Tensor,
    expert_offsets: Tensor,
    *,
    activation: str = "silu",
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float | None = None,
    layout: str = "gate_up",
    format: str = "bf16",
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    fmt = FORMATS[format]
    rows, width = gate_up.shape
    is_gated = get_activation("act_mul", activation).gated
    intermediate = width // 2 if is_gated else width
    act = empty_values(fmt, rows, intermediate, gate_up.device)
    act_scale = empty_act_scale(fmt, rows, intermediate, gate_up.device)
    if act.numel() == act_scale.numel() == 0:
        return act, act_scale
    _, experts = expert_bound(global_scale, expert_offsets)
    tile = row_tile(fmt, intermediate)
    grid = (rows, max(1, triton.cdiv(intermediate, tile["BLOCKS"] * tile["BLOCK"])))
    with on_device(gate_up):
        _act_mul_kernel[grid](
            gate_up, expert_offsets, global_scale, as_stored(act), as_stored(act_scale),
            alpha, beta, float("inf") if limit is None else limit,
            width, intermediate, expert_offsets.numel() - 1, *act_scale.stride(),
            ACTIVATION=activation, LAYOUT=layout if is_gated else "none", EXPERTS=experts, FORMAT=format, **tile,
            num_warps=row_warps(tile), **EXACT,
        )  # fmt: skip
    return act, act_scale
