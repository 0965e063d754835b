"""FlashInfer's `cutlass_fused_moe` in the words of moe::fused_moe.

    dtype of the weights, quant_scales                -> format, scales, global scales (no weight is converted)
    activation_type, swiglu_alpha / _beta / _limit    -> activation, alpha, beta, limit
    token_selected_experts, ep_size, ep_rank          -> topk_ids, -1 for experts of other ranks

Names, order and defaults of the arguments are those of FlashInfer 0.7.4 (flashinfer/fused_moe/core.py); what they mean
is read from its csrc/fused_moe/cutlass_backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from torch_moe_ops.formats import ceil_div
from torch_moe_ops.meta_kernels._check import BF16_FP16, INT32, describe, expect_range, expect_tensor, refuse
from torch_moe_ops.scale_layouts import ATOM_ROWS, WORD

OP = "cutlass_fused_moe"
BLOCK = 128  # rows of fc1 to one scale of FP8 blocks
SWIGLU_STEP_LIMIT = 7.0  # FlashInfer's default
_UNSET = object()


class ActivationType(IntEnum):
    """FlashInfer's activations; its own enum and plain numbers are taken as well."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Identity = 9
    Situ = 10
    InvalidType = 11
    ClampedRelu2 = 12
    PowLU = 13


# Those that moe::act_mul computes, by number.
ACTIVATIONS = {
    int(ActivationType.Swiglu): "silu",
    int(ActivationType.SwigluBias): "silu",
    int(ActivationType.SwigluStep): "swiglustep",
    int(ActivationType.Geglu): "gelu",
    int(ActivationType.GegluTanh): "gelu_tanh",
    int(ActivationType.Silu): "silu_no_mul",
    int(ActivationType.Gelu): "gelu_no_mul",
    int(ActivationType.Relu2): "relu2_no_mul",
}

# Arguments that have to stay at their defaults: what is refused otherwise, and what there is instead.
ELSEWHERE = "prepare such weights once: torch_moe_ops.Experts"
FIXED: dict[str, tuple[object, str]] = {
    "input_sf": (None, "16-bit input, which is quantised here"),
    "cluster_size": (1, "FlashInfer takes no other"),
    "cluster_rank": (0, "FlashInfer takes no other"),
    "use_w4_group_scaling": (False, ELSEWHERE),
    "use_mxfp8_act_scaling": (False, ELSEWHERE),
    "min_latency_mode": (False, "FlashInfer takes no other"),
    "use_packed_weights": (False, ELSEWHERE),
    "use_wfp4afp8_humming": (False, ELSEWHERE),
    "clamped_relu2_limit": (None, "no ClampedRelu2 here"),
    "situ_beta": (None, "no Situ here"),
    "situ_linear_beta": (None, "no Situ here"),
    "backend": ("cutlass", "the backend is chosen as torch_moe_ops.explain says"),
}


def cutlass_fused_moe(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor | None,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[Tensor] | None,
    fc1_expert_biases: Tensor | None = None,
    fc2_expert_biases: Tensor | None = None,
    input_sf: Tensor | None = None,
    swiglu_alpha: Tensor | float | None = None,
    swiglu_beta: Tensor | float | None = None,
    swiglu_limit: Tensor | float | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: int = ActivationType.Swiglu,
    swizzled_input_sf: bool = True,
    use_fused_finalize: bool | None = None,
    profile_ids: list[int] | None = None,
    workspace_buffer: Tensor | None = None,
    *,
    clamped_relu2_limit: Tensor | None = None,
    situ_beta: Tensor | None = None,
    situ_linear_beta: Tensor | None = None,
    backend: str = "cutlass",
    nvfp4_4over6: object = _UNSET,
) -> list[Tensor]:
    """The experts of a Mixture-of-Experts layer, called as FlashInfer's function of this name is.

        output[t] = sum over k of token_final_scales[t, k] * (fc2[e] @ y + fc2_bias[e])
        y = activation(gate) * up,   [up; gate] = fc1[e] @ input[t] + fc1_bias[e],   e = token_selected_experts[t, k]

    The rows of fc1, of its biases and of its scales are **[up; gate]**, FlashInfer's order (moe::fused_moe's own is
    [gate; up]); nothing is reordered. Under tensor parallelism I is the size of this rank's shard. No host
    synchronisation, the same bits in every run; CUDA graphs and torch.compile(fullgraph=True) work.

    Args:
        input: [T, H], bfloat16 or float16, contiguous.
        token_selected_experts: int32 [T, K], over all ranks. Rank r holds experts r*E to r*E + E - 1, and others add
            nothing. With one rank, -1 is an absent slot, and a number that does not exist an error (on a GPU: NaN).
        token_final_scales: float32 [T, K]; None: 1.
        fc1_expert_weights: [E, 2I, H], or [E, I, H] for an activation that is not gated; fc2_expert_weights: [E, H, I].
            Of input's dtype; float8_e4m3fn with use_deepseek_fp8_block_scale; or NVFP4, 16 values to an int64.
        output_dtype: input's dtype.
        quant_scales: none (None, []) for 16-bit weights.
            FP8 blocks: float32 [E, 2I/128, ceil(H/128)] and [E, H/128, I/128], rounded up; gated: I a multiple of 128.
            NVFP4: FlashInfer's six: 1 / a13, fc1's block scales, a13 * w13, and the same of fc2, where a13 and w13 are
            the global scales of activations ([] or [E]) and weights ([E]), and block scales lie in 128x4 atoms, int32.
        fc1_expert_biases, fc2_expert_biases: [E, 2I] and [E, H], bfloat16, float16 or float32; fc2's is added by
            tp_rank 0 alone.
        swiglu_alpha, swiglu_beta, swiglu_limit: y = (clamp(up, -limit, limit) + beta) * g * sigmoid(alpha * g), g =
            min(gate, limit), for Swiglu and SwigluBias; SwigluStep has the limit alone (7 if absent). A float, or a
            tensor on the CPU that is the same for all experts: one on a GPU would have to be read.
        output: [T, H], the result is copied there.
        activation_type: Swiglu, SwigluBias, SwigluStep, Geglu (erf), GegluTanh; not gated: Silu, Gelu (erf), Relu2.
        tp_size, enable_alltoall, tune_max_num_tokens, enable_pdl, swizzled_input_sf, use_fused_finalize, profile_ids,
            workspace_buffer: taken, and without effect on the result.
        The others have to be as they are by default. nvfp4_4over6 may be None; no environment variable is read.

    Returns:
        [output], a list as in FlashInfer: [T, H] in input's dtype.

    Raises:
        RuntimeError: ``cutlass_fused_moe: argument: expected ..., got ...``; for tensors that do not fit together the
            same from ``fused_moe``, where fc1 is w13, and from ``sort_slots`` for expert numbers.

    Source: FlashInfer 0.7.4, flashinfer/fused_moe/core.py.
    """
    expect_defaults(
        input_sf=input_sf,
        cluster_size=cluster_size,
        cluster_rank=cluster_rank,
        use_w4_group_scaling=use_w4_group_scaling,
        use_mxfp8_act_scaling=use_mxfp8_act_scaling,
        min_latency_mode=min_latency_mode,
        use_packed_weights=use_packed_weights,
        use_wfp4afp8_humming=use_wfp4afp8_humming,
        clamped_relu2_limit=clamped_relu2_limit,
        situ_beta=situ_beta,
        situ_linear_beta=situ_linear_beta,
        backend=backend,
    )
    if nvfp4_4over6 is not _UNSET and nvfp4_4over6 is not None:
        refuse(OP, "nvfp4_4over6", None, nvfp4_4over6)
    if input.dtype not in BF16_FP16:
        refuse(OP, "input", "bfloat16 or float16, which is quantised here", name_of(input.dtype))
    if output_dtype != input.dtype:
        refuse(OP, "output_dtype", f"{name_of(input.dtype)}, as input", name_of(output_dtype))
    if output is not None:
        expect_tensor(OP, "output", output, (input.dtype,), input.shape, input.device, contiguous=False)
    expect_range(OP, "tp_rank", tp_rank, 0, tp_size - 1)
    expect_range(OP, "ep_rank", ep_rank, 0, ep_size - 1)

    options = activation_options(activation_type, alpha=swiglu_alpha, beta=swiglu_beta, limit=swiglu_limit)
    gated = not options.get("activation", "silu").endswith("_no_mul")
    w13, w2, scales = fc1_expert_weights, fc2_expert_weights, list(quant_scales or ())
    if w13.dtype == torch.int64:
        expect_block_flag(use_deepseek_fp8_block_scale, False, w13)
        options |= nvfp4_options(w13, w2, scales)
        w13, w2 = w13.view(torch.uint8), w2.view(torch.uint8)
    elif w13.dtype == torch.float8_e4m3fn:
        expect_block_flag(use_deepseek_fp8_block_scale, True, w13)
        options |= fp8_block_options(w13, scales, gated)
    elif w13.dtype in BF16_FP16:
        expect_block_flag(use_deepseek_fp8_block_scale, False, w13)
        expect_count(scales, 0, w13)
        options |= {} if input.dtype == torch.bfloat16 else {"format": "fp16"}
    else:
        expected = f"bfloat16, float16, float8_e4m3fn or int64 (NVFP4); {ELSEWHERE}"
        refuse(OP, "fc1_expert_weights", expected, name_of(w13.dtype))
    if gated:
        options["w13_layout"] = "up_gate"
    if fc1_expert_biases is not None:
        options["w13_bias"] = fc1_expert_biases
    if fc2_expert_biases is not None and tp_rank == 0:
        options["w2_bias"] = fc2_expert_biases

    topk_ids, topk_weights = token_selected_experts, token_final_scales
    if ep_size > 1:
        num_experts = w13.shape[0]
        here = topk_ids // num_experts == ep_rank
        topk_ids = torch.where(here, topk_ids - ep_rank * num_experts, -1)
    if topk_weights is None:
        topk_weights = torch.ones_like(topk_ids, dtype=torch.float32)
    result = torch.ops.moe.fused_moe(input, w13, w2, topk_weights, topk_ids, **options)
    return [result if output is None else output.copy_(result)]


def expect_defaults(**arguments: object) -> None:
    for name, value in arguments.items():
        default, instead = FIXED[name]
        if isinstance(value, Tensor) or value != default:
            refuse(OP, name, f"{default} ({instead})", describe_any(value))


def activation_options(activation_type: int, **numbers: Tensor | float | None) -> dict[str, object]:
    """activation, alpha, beta and limit of moe::fused_moe, without those at their defaults."""
    activation = ACTIVATIONS.get(int(activation_type))
    if activation is None:
        names = ", ".join(map(activation_name, ACTIVATIONS))
        refuse(OP, "activation_type", f"one of {names}", activation_name(activation_type))
    taken = {"silu": ("alpha", "beta", "limit"), "swiglustep": ("limit",)}.get(activation, ())
    options: dict[str, object] = {} if activation == "silu" else {"activation": activation}
    if activation == "swiglustep":
        options["limit"] = SWIGLU_STEP_LIMIT
    for name, value in numbers.items():
        if value is None:
            continue
        if name not in taken:
            refuse(OP, f"swiglu_{name}", f"None for {activation_name(activation_type)}", describe_any(value))
        options[name] = one_number(f"swiglu_{name}", value)
    return options


def activation_name(number: int) -> str:
    return {int(kind): kind.name for kind in ActivationType}.get(int(number), str(number))


def one_number(name: str, value: Tensor | float) -> float:
    """The number that is the same for all experts. Only what lies on the CPU can be read without a synchronisation."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "cpu":
        refuse(OP, name, "a float, or a tensor on the CPU (on a GPU it would have to be read)", describe_any(value))
    numbers = sorted(set(value.flatten().tolist()))
    if len(numbers) != 1:
        refuse(OP, name, "one value for all experts", numbers)
    return numbers[0]


def fp8_block_options(w13: Tensor, scales: list[Tensor], gated: bool) -> dict[str, object]:
    """FlashInfer counts blocks of rows in all of fc1, moe::fused_moe in each half: the same if no block has both."""
    expect_count(scales, 2, w13)
    if gated and w13.shape[1] % (2 * BLOCK):
        got = list(w13.shape)
        refuse(OP, "fc1_expert_weights", f"halves of a multiple of {BLOCK} rows, so that no scale is of both", got)
    return {"format": "fp8_block", "w13_scale": scales[0], "w2_scale": scales[1]}


def nvfp4_options(w13: Tensor, w2: Tensor, scales: list[Tensor]) -> dict[str, object]:
    """FlashInfer multiplies activations by the reciprocal of their global scale before it rounds them, and each GEMM's
    sums by the product of both global scales."""
    expect_count(scales, 6, w13)
    inverse_a13, blocks13, product13, inverse_a2, blocks2, product2 = scales
    return {
        "format": "nvfp4",
        "w13_scale": atoms("quant_scales[1]", blocks13, w13),
        "w2_scale": atoms("quant_scales[4]", blocks2, w2),
        "a13_global_scale": inverse_a13.reciprocal(),
        "a2_global_scale": inverse_a2.reciprocal(),
        "w13_global_scale": product13 * inverse_a13,
        "w2_global_scale": product2 * inverse_a2,
    }


def atoms(name: str, scale: Tensor, weight: Tensor) -> Tensor:
    """The block scales of weight [E, N, K/16], int32 [E, round_up(N, 128), ceil(K/64)], viewed as `pack_scale`'s."""
    num_experts, rows, columns = weight.shape
    atom_rows, words = ceil_div(rows, ATOM_ROWS), ceil_div(columns, WORD)
    expect_tensor(OP, name, scale, INT32, (num_experts, atom_rows * ATOM_ROWS, words), weight.device)
    return scale.view(torch.float8_e4m3fn).view(num_experts, atom_rows, words, 32, 4, WORD)


def expect_block_flag(flag: bool, expected: bool, weight: Tensor) -> None:
    if flag != expected:
        instead = " (a scale per tensor: repeat it once, for every block)" if expected else ""
        refuse(OP, "use_deepseek_fp8_block_scale", f"{expected} for {name_of(weight.dtype)} weights{instead}", flag)


def expect_count(scales: list[Tensor], count: int, weight: Tensor) -> None:
    if len(scales) != count:
        refuse(OP, "quant_scales", f"{count} tensors for {name_of(weight.dtype)} weights", len(scales))


def describe_any(value: object) -> object:
    return describe(value.dtype, value.shape, value.device) if isinstance(value, Tensor) else value


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
