"""What the adapter takes over, and SGLang's settings in the words of moe::fused_moe.

SGLang's objects are read by attribute, with the default of the versions that lack one, so nothing here imports SGLang.

    quantisation method, layer   -> format
    MoeRunnerConfig              -> activation, alpha, beta, limit, w13_layout
    MoeRunnerConfig, device      -> routed_scaling_factor
"""

from __future__ import annotations

import torch

NAME = "torch_moe"

SUPPORTED = (
    "a model with unquantised bf16 or fp16 experts or with FP8 experts in 128x128 blocks, served with tensor or expert "
    "parallelism, --moe-a2a-backend none, no LoRA and no single-batch overlap"
)

UNQUANTISED, FP8 = "UnquantizedFusedMoEMethod", "Fp8MoEMethod"

DTYPE_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
GATED_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"}
OTHER_ACTIVATIONS = {"silu": "silu_no_mul", "gelu": "gelu_no_mul", "relu2": "relu2_no_mul"}


class Unsupported(ValueError):
    """One sentence that ends the start of the server: what is supported, and what came."""

    def __init__(self, got: str) -> None:
        super().__init__(f"--moe-runner-backend {NAME}: expected {SUPPORTED}, got {got}")


def weight_format(method: object, layer: object) -> str:
    """The format of a layer's experts; `method` is the layer's quantisation method, whose weights exist already."""
    name = type(method).__name__
    if name == UNQUANTISED:
        dtype = layer.w13_weight.dtype
        if dtype not in DTYPE_FORMATS:
            raise Unsupported(f"unquantised experts in {dtype}")
        return DTYPE_FORMATS[dtype]
    if name != FP8:
        raise Unsupported(f"experts under {name}")
    if getattr(method, "use_mxfp8", False):
        raise Unsupported("mxfp8 experts")
    if getattr(method, "is_fp4_expert", False):
        raise Unsupported("FP4 experts in an FP8 checkpoint")
    block = getattr(method, "weight_block_size", None)
    if block is None or list(block) != [128, 128]:
        raise Unsupported(f"FP8 experts with {'a scale per tensor' if block is None else f'blocks of {list(block)}'}")
    if layer.w13_weight.dtype != torch.float8_e4m3fn or layer.w13_weight_scale_inv.dtype != torch.float32:
        raise Unsupported(f"FP8 experts in {layer.w13_weight.dtype} with {layer.w13_weight_scale_inv.dtype} scales")
    return "fp8_block"


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
    if alpha is not None:
        beta = 1.0 if beta is None else beta
        layout = "interleaved" if config.gate_up_interleaved else "gate_up"
        return {"activation": name, "alpha": alpha, "beta": beta, "limit": step_limit, "w13_layout": layout}
    if beta not in (None, 0.0):
        raise Unsupported(f"gemm1_beta {beta} without gemm1_alpha")
    if step_limit is not None:
        return {"activation": "swiglustep", "limit": step_limit}
    return {"activation": name, "limit": limit}


def router_weight_options(config: object) -> dict[str, object]:
    """Where the router's weights are applied; the sum over the experts of a token is always taken here."""
    if config.no_combine:
        raise Unsupported("a model that adds up the experts' outputs itself (no_combine)")
    on_input = bool(config.apply_router_weight_on_input)
    if on_input and config.top_k != 1:
        raise Unsupported(f"apply_router_weight_on_input with top_k {config.top_k}")
    return {"apply_router_weight_on_input": on_input}


def routed_scaling_factor(config: object, *, on_gpu: bool, in_topk: bool) -> float:
    """The factor that is left for moe::fused_moe, so that it is applied once.

    On a GPU SGLang's models leave it to the runner unless TopK has applied it (`in_topk`:
    layer.should_fuse_routed_scaling_factor_in_topk); elsewhere they multiply themselves.
    """
    factor = config.routed_scaling_factor
    return 1.0 if factor is None or in_topk or not on_gpu else float(factor)
