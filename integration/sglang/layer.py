"""One MoE layer of SGLang on moe::fused_moe:

    hidden_states [T, H], topk_weights f32 [T, K], topk_ids i32 [T, K], w13 [E, 2I, H], w2 [E, H, I] -> output [T, H]

E is the number of experts on this rank and I this rank's share of the intermediate size. With expert parallelism
SGLang's dispatcher has turned the router's ids into local ones already, -1 for the experts of other ranks. The weights
are read from the layer at every call, because SGLang may replace them while it serves (weight updates).
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

import torch_moe_ops as moe

from .support import (
    DTYPE_FORMATS,
    Unsupported,
    activation_options,
    routed_scaling_factor,
    router_weight_options,
    weight_format,
)

logger = logging.getLogger("sglang.srt.torch_moe_ops")  # below "sglang", whose level --log-level sets


class LayerRunner:
    """A layer's `quant_method.runner`; two of its methods replace those of the quantisation method."""

    def __init__(self, method: object, layer: torch.nn.Module, config: object, backend: object, combine: type) -> None:
        """`backend` is SGLang's record of the flag's value, `combine` its StandardCombineInput."""
        self.format = weight_format(method, layer)
        self.options = {**activation_options(config), **router_weight_options(config)}
        self.config = config
        self.runner_backend = backend
        self.combine = combine

    def take_over(self, method: object) -> None:
        method.runner = self
        method.apply = self.apply
        method.process_weights_after_loading = self.process_weights_after_loading

    def weights(self, layer: torch.nn.Module) -> dict[str, torch.Tensor | None]:
        """The layer's tensors under their names in moe::fused_moe. `scale_inv` is a multiplier in spite of its name."""
        tensors = {"w13": layer.w13_weight, "w2": layer.w2_weight}
        tensors |= {f"{name}_bias": getattr(layer, f"{name}_weight_bias", None) for name in ("w13", "w2")}
        if self.format == "fp8_block":
            tensors |= {"w13_scale": layer.w13_weight_scale_inv, "w2_scale": layer.w2_weight_scale_inv}
        return tensors

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing is repacked. What moe::fused_moe would refuse at the first request is refused here."""
        weights = self.weights(layer)
        options = {name: value for name, value in self.options.items() if name != "w13_layout"}  # only a row order
        experts = moe.Experts(**weights, format=self.format, **options)
        explanation = moe.explain(
            device=weights["w13"].device,
            format=self.format,
            activation=options["activation"],
            hidden_size=experts.hidden_size,
            intermediate_size=experts.intermediate_size,
            num_experts=experts.num_experts,
            top_k=self.config.top_k,
            bias_dtype=None if weights["w13_bias"] is None else weights["w13_bias"].dtype,
        )
        if explanation.backend is None:
            raise Unsupported(f"a layer that no backend runs here: {explanation}")
        log_once(f"torch_moe_ops: moe::fused_moe.{explanation.backend} runs the experts ({experts.extra_repr()})")

    def apply(self, layer: torch.nn.Module, dispatch_output: object) -> object:
        hidden_states, topk_output = dispatch_output.hidden_states, dispatch_output.topk_output
        if hidden_states.dtype not in DTYPE_FORMATS:
            raise Unsupported(f"hidden states in {hidden_states.dtype}")
        factor = routed_scaling_factor(
            self.config,
            on_gpu=hidden_states.is_cuda,
            in_topk=layer.should_fuse_routed_scaling_factor_in_topk,
        )
        output = moe.fused_moe(
            hidden_states.contiguous(),
            topk_weights=topk_output.topk_weights.float(),
            topk_ids=topk_output.topk_ids.int(),
            format=self.format,
            routed_scaling_factor=factor,
            **self.weights(layer),
            **self.options,
        )
        return self.combine(hidden_states=output)

    def set_overlap_args(self, *_: object, **__: object) -> None:
        raise Unsupported("overlap of the down projection with the combine step")

    def clear_overlap_args(self) -> None:
        """There are never any."""


@lru_cache
def log_once(message: str) -> None:
    """Once in a process: a model has dozens of layers that are alike."""
    logger.info(message)
