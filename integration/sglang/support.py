"""What the adapter takes over, and SGLang's settings in the words of moe::fused_moe.

SGLang's objects are read by attribute, with the default of the versions that lack one, so nothing here imports SGLang.

    device                       -> the sentence that says what is supported there
    MoeRunnerConfig              -> activation, alpha, beta, limit, w13_layout
    MoeRunnerConfig, device      -> routed_scaling_factor
    TopK's output                -> topk_weights, topk_ids
"""

from __future__ import annotations

import torch

from torch_moe_ops.backends import explain_choices
from torch_moe_ops.formats import get_format

NAME = "torch_moe"

# What SGLang's users call the formats, in the order of the sentence.
FORMAT_WORDS = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp8_block": "FP8 (128x128 blocks or a scale per tensor)",
    "mxfp8": "MXFP8",
    "int8": "W8A8 INT8",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
}

DTYPE_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
GATED_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"}
OTHER_ACTIVATIONS = {"silu": "silu_no_mul", "gelu": "gelu_no_mul", "relu2": "relu2_no_mul"}

# Models whose code calls SGLang's kernels itself (QuantMixtral: what SGLang makes of Mixtral in most quantisations),
# routes (Inkling) in a form that only these read, or names the runners that it takes (Beam).
OWN_EXPERTS = {
    "AfmoeForCausalLM",
    "BeamForCausalLM",
    "DbrxForCausalLM",
    "DeepseekForCausalLM",
    "InklingForConditionalGeneration",
    "InklingForConditionalGenerationMTP",
    "MuseSparkForConditionalGeneration",
    "QuantMixtralForCausalLM",
    "XverseMoeForCausalLM",
}

# What may multiply the weights of a format, the best first: "" is the format itself, "bf16" the dtype of the hidden
# states. MXFP4 models are made for 16-bit or MXFP8 activations.
ACT_FORMATS = {"mxfp8": ("", "bf16"), "mxfp4": ("bf16", "mxfp8"), "nvfp4": ("", "bf16")}


def act_formats(format: str, hidden: str = "bf16") -> tuple[str, ...]:
    return tuple(hidden if act_format == "bf16" else act_format for act_format in ACT_FORMATS.get(format, ("",)))


def supported(device: torch.device | str | None = None) -> str:
    """What the adapter takes on a device (None: the GPU of this machine, or its CPU), as the package says."""

    def runs(format: str) -> bool:
        return explain_choices(format, act_formats(format), device=device)[-1].backend is not None

    formats = [words for format, words in FORMAT_WORDS.items() if runs(format)]
    return (
        f"a model with experts in {', '.join(formats)}, served with tensor or expert parallelism, "
        "--moe-a2a-backend none, no LoRA and no single-batch overlap"
    )


def own_experts(model: str) -> str:
    """Of a model's class: what the refusal says came."""
    return f"{model}, whose code is made for SGLang's own experts"


class Unsupported(ValueError):
    """One sentence that ends the start of the server: what is supported, and what came."""

    def __init__(self, got: str, device: torch.device | str | None = None) -> None:
        super().__init__(f"--moe-runner-backend {NAME}: expected {supported(device)}, got {got}")


def activation_options(config: object) -> dict[str, object]:
    """The activation between the two GEMMs, as SGLang's own Triton runner reads its MoeRunnerConfig:

    silu with gemm1_alpha          (up + 1) * gate * sigmoid(alpha * gate) after clamping to gemm1_clamp_limit (gpt-oss)
    silu with gemm1_clamp_limit    min(silu(gate), limit) * clamp(up, -limit, limit)
    silu with swiglu_limit         silu(min(gate, limit)) * clamp(up, -limit, limit)
    """
    alpha, beta = config.gemm1_alpha, getattr(config, "gemm1_beta", None)
    step_limit, limit = config.gemm1_clamp_limit, getattr(config, "swiglu_limit", None)
    names = GATED_ACTIVATIONS if config.is_gated else OTHER_ACTIVATIONS
    if config.activation not in names:
        raise Unsupported(f"the activation {config.activation} ({'' if config.is_gated else 'not '}gated)")
    name = names[config.activation]
    if name != "silu":
        if (alpha, beta, step_limit, limit) != (None,) * 4:
            raise Unsupported(f"the activation {name} with alpha {alpha}, beta {beta}, limit {step_limit or limit}")
        return {"activation": name}
    if limit is not None and (alpha is not None or step_limit is not None):
        raise Unsupported(f"swiglu_limit {limit} with gemm1_alpha {alpha} and gemm1_clamp_limit {step_limit}")
    if alpha is not None:
        beta = 1.0 if beta is None else beta
        layout = "interleaved" if config.gate_up_interleaved else "gate_up"
        return {"activation": name, "alpha": alpha, "beta": beta, "limit": step_limit, "w13_layout": layout}
    if beta not in (None, 0.0):
        raise Unsupported(f"gemm1_beta {beta} without gemm1_alpha")
    if step_limit is not None:
        return {"activation": "swiglustep", "limit": step_limit}
    return {"activation": name, "limit": limit}


def scales_are_shared_by_rows(format: str) -> bool:
    """Whether interleaved gate and up would share scales that were made for one of them."""
    fmt = get_format("torch_moe", format)
    return fmt.has_global_scale or (fmt.has_scale and fmt.weight_block[0] > 1)


def router_weight_options(config: object) -> dict[str, object]:
    """Where the router's weights are applied."""
    on_input = bool(config.apply_router_weight_on_input)
    if on_input and config.top_k not in (1, None):  # None, as in Llama 4: moe::fused_moe looks at the ids
        raise Unsupported(f"apply_router_weight_on_input with top_k {config.top_k}")
    return {"apply_router_weight_on_input": on_input}


def routed_scaling_factor(config: object, *, on_gpu: bool) -> float:
    """The factor that is left for moe::fused_moe: on a GPU SGLang's models leave it to the runner, elsewhere not."""
    factor = config.routed_scaling_factor
    return 1.0 if factor is None or not on_gpu else float(factor)


def routed_tokens(topk_output: object) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang has other forms for its own backends: the router's logits, weights and ids packed into one tensor."""
    if not hasattr(topk_output, "topk_ids"):
        raise Unsupported(f"a router that gives {type(topk_output).__name__}")
    return topk_output.topk_weights.float(), topk_output.topk_ids.int()
