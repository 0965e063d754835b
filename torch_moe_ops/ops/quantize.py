"""values, scale = quantize(input): input [rows, K] ~= values [rows, K/pack] * scale * global_scale."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = """(Tensor input, str format, *, Tensor? global_scale=None) -> (Tensor values, Tensor scale)"""


def facts(input: Tensor, format: str, **_: object) -> dict[str, object]:
    return {"format": format}


def quantize(input: Tensor, format: str, *, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantises activations; the same bits on every backend.

        scale[block] from amax(|input|) of the block;  values = round(input / (scale * global_scale)), saturating

    Args:
        input: bfloat16, float16 or float32 [rows, K], contiguous.
        format: a name in ``torch_moe_ops.FORMATS``; the block is the format's ``act_block``.
        global_scale: float32, one element; nvfp4 only (1 if absent).

    Returns:
        values [rows, K/pack] and scale [rows, ceil(K / block_k)] (int8: [rows, 1]; bf16, fp16: [rows, 0]), contiguous.

    Raises:
        RuntimeError: ``quantize: argument: expected ..., got ...``

    Sources: OCP Microscaling Formats (MX) v1.0 for e8m0 and e2m1 with blocks of 32; NVFP4 for blocks of 16 with e4m3
    scales; DeepSeek-V3, arXiv:2412.19437, section 3.3, for fp8_block.
    """
    return torch.ops.moe.quantize.default(input, format, global_scale=global_scale)
