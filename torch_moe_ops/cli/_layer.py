"""Random MoE layers whose right answer is known, for `demo` and `bench`.

    out[t] = sum over k of topk_weights[t, k] * w2[e] @ (silu(gate) * up)
             with gate, up = w13[e] @ hidden_states[t], e = topk_ids[t, k], dequantised weights, all in float32

so that its distance from a backend's output is the rounding of activations and intermediates, and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import explain_choices
from ..experts import Experts, local_expert_map
from ..formats import FORMATS, ceil_div, quantize_weight
from ..packed_weights import is_packed, unpack_weight

# Root mean square of x - dequantize(quantize(x)) over that of x, for normal x and the activation blocks of each format.
ROUNDING = {
    "bf16": 0.0017,
    "fp16": 0.0002,
    "int8": 0.009,
    "fp8_block": 0.027,
    "fp8_block_e8m0": 0.027,
    "mxfp8": 0.027,
    "mxfp4": 0.117,
    "nvfp4": 0.097,
}
# Largest normal weight chunk made at a time, in elements.
CHUNK_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class Case:
    """The sizes of one rank's share of a layer; it holds experts 0 .. num_experts - 1 of num_router_experts.

    num_groups and topk_groups are those of the model's own top-k: by sigmoid and with a bias, if there are groups. The
    routing of a benchmark is `make_inputs`', whatever they are.
    """

    name: str
    num_experts: int
    num_router_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    num_groups: int = 1
    topk_groups: int = 1


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("dsv3_ep8", 32, 256, 7168, 2048, 8, num_groups=8, topk_groups=4),
        Case("dsv3_tp8", 256, 256, 7168, 256, 8, num_groups=8, topk_groups=4),
        Case("qwen30b", 128, 128, 2048, 768, 8),
        Case("qwen235b_tp4", 128, 128, 4096, 384, 8),
        Case("mixtral", 8, 8, 4096, 14336, 2),
        Case("gptoss", 128, 128, 2880, 2880, 4),
        Case("dsv2", 160, 160, 5120, 1536, 6),
        Case("e16_top1", 16, 16, 6144, 2560, 1),
        Case("kimi_k2_ep8", 48, 384, 7168, 2048, 8),
        Case("dsv4pro_ep8", 48, 384, 7168, 3072, 6),
    )
}
CASE_GROUPS: dict[str, tuple[str, ...]] = {
    "default": ("dsv3_ep8", "dsv3_tp8", "qwen30b", "qwen235b_tp4", "mixtral", "gptoss"),
    "untuned": ("dsv2", "e16_top1", "kimi_k2_ep8", "dsv4pro_ep8"),
    "all": tuple(CASES),
}
ROUTINGS = ("uniform", "zipf")
# With the rankings from this seed on, a rank of the expert-parallel cases gets 0.115 to 0.135 of the slots, about its
# 1/8, in the first call and in the first 2, 4 and 8 together; with other seeds it gets 0.06 to 0.24 in the first call.
ZIPF_SEED = 1144
TINY = Case("tiny", 4, 8, 256, 192, 2)


def make_experts(case: Case, format: str, act_format: str = "", device: str = "cuda", seed: int = 1) -> Experts:
    """Normal weights / sqrt(K), each 128 x 128 block of its own magnitude, so that a wrong scale index shows up.

    One rank of several has an expert_map, which says so: the ids of `make_inputs` are local already.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    sizes = {
        "w13": (2 * case.intermediate_size, case.hidden_size, 2),
        "w2": (case.hidden_size, case.intermediate_size, 1),
    }
    tensors: dict[str, Tensor] = {}
    for name, (n, k, parts) in sizes.items():
        step = max(1, CHUNK_ELEMENTS // (n * k))
        for first in range(0, case.num_experts, step):
            count = min(step, case.num_experts - first)
            chunk = quantize_weight(_random_weight(count, n, k, generator), format, parts=parts)
            for suffix, part in zip(("", "_scale", "_global_scale"), chunk, strict=True):
                if part is not None:
                    whole = tensors.setdefault(name + suffix, part.new_empty((case.num_experts, *part.shape[1:])))
                    whole[first : first + count] = part
    if case.num_experts < case.num_router_experts:
        tensors["expert_map"] = local_expert_map(case.num_experts, case.num_router_experts, device)
    experts = Experts(tensors.pop("w13"), tensors.pop("w2"), **tensors, format=format, act_format=act_format)
    return experts.packed() if needs_packing(experts) else experts


def needs_packing(experts: Experts) -> bool:
    """Whether the device takes such experts packed only."""
    explanation = explain_choices(experts.format, (experts.act_format,), device=experts.w2.device)[-1]
    return explanation.backend is not None and explanation.problem.packed


def _random_weight(count: int, n: int, k: int, generator: torch.Generator) -> Tensor:
    """[count, n, k] float32."""
    device = generator.device
    weight = torch.randn(count, n, k, device=device, generator=generator)
    magnitude = torch.rand(count, ceil_div(n, 128), ceil_div(k, 128), device=device, generator=generator)
    magnitude = (0.5 + 1.5 * magnitude) / math.sqrt(k)
    return weight.mul_(magnitude.repeat_interleave(128, 1)[:, :n].repeat_interleave(128, 2)[:, :, :k])


def make_inputs(
    case: Case,
    num_tokens: int,
    generator: torch.Generator,
    index: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    routing: str = "uniform",
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states [T, H], topk_weights f32 [T, K], topk_ids i32 [T, K] with -1 for experts of other ranks.

    Distinct experts, at random as `routing` says; token 0 always has a local one, another one for another `index`.
    """
    device = generator.device
    hidden_states = torch.randn(num_tokens, case.hidden_size, device=device, generator=generator).to(dtype)
    score = torch.rand(num_tokens, case.num_router_experts, device=device, generator=generator)
    if routing == "zipf":
        # The largest K of log(p) + Gumbel noise are K draws without replacement, each in proportion to p.
        score = zipf(case.num_router_experts, index).to(device).log() - score.log().neg_().log_()
    if num_tokens and case.num_experts < case.num_router_experts:
        score[0, (5 * index + 3) % case.num_experts] = math.inf
    topk_ids = score.topk(case.top_k, dim=1).indices.int()
    topk_ids = torch.where(topk_ids < case.num_experts, topk_ids, -1)
    logits = torch.randn(num_tokens, case.top_k, device=device, generator=generator)
    return hidden_states, logits.softmax(dim=1), topk_ids


def zipf(num_experts: int, index: int) -> Tensor:
    """How often each expert is drawn, [E] on the CPU: in proportion to 1 / rank.

    Every `index` ranks the experts anew, as another layer would; the ranks are the same on every device.
    """
    return 1 / (1 + torch.randperm(num_experts, generator=torch.Generator().manual_seed(ZIPF_SEED + index)))


def input_dtype(experts: Experts) -> torch.dtype:
    """Of the hidden states: the activations' own where they are not quantised, else bf16."""
    return torch.float16 if (experts.act_format or experts.format) == "fp16" else torch.bfloat16


def reference(experts: Experts, inputs: tuple[Tensor, Tensor, Tensor], max_rows: int = 48) -> tuple[Tensor, Tensor]:
    """At most `max_rows` tokens, evenly spaced -> (their indices, their outputs in float32)."""
    hidden_states, topk_weights, topk_ids = inputs
    num_tokens = hidden_states.shape[0]
    rows = torch.linspace(0, num_tokens - 1, min(num_tokens, max_rows), device=hidden_states.device).round().long()
    x, weights, ids = hidden_states[rows].float(), topk_weights[rows], topk_ids[rows]
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        token, k = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], dequantized(experts, "w13", expert, parts=2)).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, dequantized(experts, "w2", expert, parts=1))
        out.index_add_(0, token, y * weights[token, k, None])
    return rows, out


def dequantized(experts: Experts, name: str, expert: int, parts: int) -> Tensor:
    """One expert's weight, float32 [N, K]."""
    fmt = FORMATS[experts.format]
    values, scale, global_scale = (getattr(experts, name + suffix) for suffix in ("", "_scale", "_global_scale"))
    if is_packed(values):
        values, scale = unpack_weight(values[expert : expert + 1], experts.format)
        return fmt.dequantize(
            values[0], scale[0], fmt.weight_block, None if global_scale is None else global_scale[expert], parts
        )
    if scale is None:
        return values[expert].float()
    global_scale = None if global_scale is None else global_scale[expert]
    return fmt.dequantize(values[expert], scale[expert], fmt.weight_block, global_scale, parts)


def relative_error(output: Tensor, expected: Tensor) -> float:
    """|output - expected| / |expected| (2-norms); NaN if anything is not finite."""
    output = output.float()
    if not output.isfinite().all():
        return math.nan
    return ((output - expected).norm() / expected.norm().clamp(min=1e-20)).item()


def tolerance(experts: Experts) -> float:
    """The largest `relative_error` of a right answer.

    The rounding of the hidden states reaches gate and up (about independent: sqrt 2), that of act_mul's output once
    more, together sqrt 3 * ROUNDING; half as much again for the spread, and bf16 intermediates and output on top.
    """
    act_format = experts.act_format or experts.format
    return 1.5 * (math.sqrt(3) * ROUNDING[act_format] + math.sqrt(3) * ROUNDING["bf16"])
