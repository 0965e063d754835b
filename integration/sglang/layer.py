"""One MoE layer of SGLang on moe::fused_moe:

    hidden_states [T, H], topk_weights f32 [T, K], topk_ids i32 [T, K], w13 [E, 2I, H], w2 [E, H, I] -> output [T, H]

E is the number of experts on this rank and I this rank's share of the intermediate size. With expert parallelism
SGLang's dispatcher has turned the router's ids into local ones already, -1 for the experts of other ranks and for rows
that only pad the batch; an `expert_map` tells moe::fused_moe how many experts the router has. The weights are read from
the layer at every call, because SGLang may replace them while it serves (weight updates, expert rebalancing).
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

import torch_moe_ops as moe
from torch_moe_ops.backends import Explanation, explain_choices

from .methods import Stored, replace_buffer, replace_parameter, stored
from .support import (
    DTYPE_FORMATS,
    FORMAT_WORDS,
    Unsupported,
    activation_options,
    routed_scaling_factor,
    routed_tokens,
    router_weight_options,
    scales_are_shared_by_rows,
)

logger = logging.getLogger("sglang.srt.torch_moe_ops")  # below "sglang", whose level --log-level sets


EXPERT_MAP = "torch_moe_expert_map"  # a buffer of the layer
NO_UPDATES = "_derived_weight_cache_error"  # SGLang's name (> 0.5.17): why it shall refuse to update a module's weights


class LayerRunner:
    """A layer's `quant_method.runner`; some of its methods replace those of the quantisation method."""

    def __init__(self, method: object, layer: torch.nn.Module, config: object, backend: object, combine: type) -> None:
        """`backend` is SGLang's record of the flag's value, `combine` its StandardCombineInput. The layer's weights
        exist already, but hold nothing yet."""
        self.stored = stored(method, layer)
        self.config = config
        self.runner_backend = backend
        self.combine = combine
        self.configure(layer)

    def configure(self, layer: torch.nn.Module) -> None:
        """From the configuration as it is now: some models change it once the layer is built (GigaChat 3.5)."""
        self.options = {**activation_options(self.config), **router_weight_options(self.config)}
        if self.options.get("w13_layout") == "interleaved" and scales_are_shared_by_rows(self.stored.format):
            raise Unsupported(f"{FORMAT_WORDS[self.stored.format]} experts with gate and up interleaved row by row")
        self.explanation = choose_backend(self.stored, layer, self.options["activation"], self.config.top_k)
        self.options |= {"format": self.stored.format, "act_format": self.explanation.problem.act_format}

    @property
    def on_gpu(self) -> bool:
        return self.explanation.problem.device_type == "cuda"

    def take_over(self, method: object) -> None:
        method.moe_runner_config = self.config
        method.runner = self
        method.get_moe_runner_backend = lambda layer: self.runner_backend  # TopK asks in 0.5.23
        method.apply = self.apply
        method.process_weights_after_loading = self.process_weights_after_loading

    def scales(self, layer: torch.nn.Module) -> dict[str, Tensor | None]:
        """The layer's scales and biases under their names in moe::fused_moe."""
        names = {f"{name}_bias": f"{name}_weight_bias" for name in ("w13", "w2")} | self.stored.names
        if self.explanation.problem.act_format in DTYPE_FORMATS.values():  # activations that are not quantised
            names = {name: attribute for name, attribute in names.items() if not name.startswith("a")}
        return {name: getattr(layer, attribute, None) for name, attribute in names.items()}

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """What moe::fused_moe would refuse at the first request is refused here."""
        if getattr(layer, NO_UPDATES, None) is not None:  # packed already, and refused every update since
            return
        self.stored.prepare(layer)
        self.configure(layer)
        acts = self.explanation.problem.act_format or self.stored.format
        scales = [getattr(layer, f"a{gemm}_global_scale", None) for gemm in (13, 2)]
        if acts == "nvfp4" and all(scale is None or bool((scale == 1).all()) for scale in scales):
            raise Unsupported("NVFP4 experts without input scales, which SGLang takes for 1, where they are needed")
        num_experts, num_router_experts = layer.w2_weight.shape[0], getattr(self.config, "num_experts", None) or 0
        if num_experts < num_router_experts:
            expert_map = moe.local_expert_map(num_experts, num_router_experts, layer.w2_weight.device)
            replace_buffer(layer, EXPERT_MAP, expert_map)
        if self.explanation.problem.packed:
            self.pack(layer)
        options = {name: value for name, value in self.options.items() if name != "w13_layout"}  # only a row order
        experts = moe.Experts(layer.w13_weight, layer.w2_weight, **self.scales(layer), **options)
        log_once(f"torch_moe_ops: moe::fused_moe.{self.explanation.backend} runs the experts ({experts.extra_repr()})")

    def pack(self, layer: torch.nn.Module) -> None:
        """The layer's weights and scales in the kernels' own order, in their place, gate over up."""
        layout = self.options.get("w13_layout", "gate_up")
        if layout == "interleaved":
            for name in ("w13_weight", self.stored.names["w13_scale"], "w13_weight_bias"):
                if (tensor := getattr(layer, name, None)) is not None:
                    replace_parameter(layer, name, moe.to_gate_up(tensor.detach(), layout))
            self.options["w13_layout"] = "gate_up"
        for name in ("w13", "w2"):
            weight, scale = f"{name}_weight", self.stored.names[f"{name}_scale"]
            packed = moe.pack_weight(getattr(layer, weight), getattr(layer, scale), self.stored.format)
            replace_parameter(layer, weight, packed)
            for attribute in (scale, f"{name}_weight_packed"):  # under either name, so that the memory goes
                if hasattr(layer, attribute):
                    setattr(layer, attribute, None)
        setattr(layer, NO_UPDATES, "torch_moe_ops: weights that were packed for the kernels cannot be updated.")

    def apply(self, layer: torch.nn.Module, dispatch_output: object) -> object:
        hidden_states, topk_output = dispatch_output.hidden_states, dispatch_output.topk_output
        if hidden_states.dtype not in DTYPE_FORMATS:
            raise Unsupported(f"hidden states in {hidden_states.dtype}")
        routed = routed_tokens(topk_output)
        if self.config.no_combine:
            return self.combine(hidden_states=self._one_output_per_slot(layer, hidden_states, *routed))
        factor = routed_scaling_factor(self.config, on_gpu=self.on_gpu)
        return self.combine(hidden_states=self._fused_moe(layer, hidden_states, *routed, routed_scaling_factor=factor))

    def _fused_moe(self, layer: torch.nn.Module, hidden_states: Tensor, *routed: Tensor, **options: object) -> Tensor:
        tensors = (hidden_states.contiguous(), layer.w13_weight, layer.w2_weight, *routed)
        expert_map = getattr(layer, EXPERT_MAP, None)
        if expert_map is not None and layer.w2_weight.shape[0] < len(expert_map):  # not the experts of all ranks
            options["expert_map"] = expert_map
        return moe.fused_moe(*tensors, **self.scales(layer), **self.options, **options)

    def _one_output_per_slot(
        self, layer: torch.nn.Module, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor
    ) -> Tensor:
        """[T, K, H]: every slot as a token of its own. As in SGLang's Triton runner, the model weighs and scales."""
        config, (num_tokens, top_k) = self.config, topk_ids.shape
        if not (config.apply_router_weight_on_input or getattr(config, "no_combine_keep_router_weight", False)):
            topk_weights = torch.ones_like(topk_weights)
        slots = hidden_states.repeat_interleave(top_k, dim=0)
        output = self._fused_moe(layer, slots, topk_weights.reshape(-1, 1), topk_ids.reshape(-1, 1))
        return output.unflatten(0, (num_tokens, top_k))

    def set_overlap_args(self, *_: object, **__: object) -> None:
        raise Unsupported("overlap of the down projection with the combine step")

    def clear_overlap_args(self) -> None:
        """There are never any."""


def choose_backend(stored: Stored, layer: torch.nn.Module, activation: str, top_k: int | None) -> Explanation:
    """Of the first kind of activations that a backend on the layer's device multiplies by these weights."""
    w2 = getattr(layer, "w2_weight", None)
    if w2 is None:  # compressed-tensors' name for packed values
        w2 = layer.w2_weight_packed
    if w2.device.type == "meta":
        raise Unsupported("a model that SGLang builds without memory, as with --load-format layered")
    bias = getattr(layer, "w13_weight_bias", None)
    facts = {
        "device": w2.device,
        "activation": activation,
        "hidden_size": w2.shape[1],
        "intermediate_size": w2.shape[2] * moe.FORMATS[stored.format].pack,
        "num_experts": w2.shape[0],
        "top_k": top_k,
        "bias_dtype": None if bias is None else bias.dtype,
    }
    explanations = explain_choices(stored.format, stored.act_formats, **facts)
    if explanations[-1].backend is not None:
        return explanations[-1]
    reasons = "; ".join(f"{verdict.backend}: {verdict.reason}" for verdict in explanations[0].verdicts)
    raise Unsupported(f"{stored.format} experts that no backend runs here ({reasons})", w2.device)


@lru_cache
def log_once(message: str) -> None:
    """Once in a process: a model has dozens of layers that are alike."""
    logger.info(message)
