#!/usr/bin/env python3
"""Writes small Mixture-of-Experts checkpoints that SGLang loads, with random weights or with a configuration alone.

    python benchmarks/sglang_models.py glm4 fp8_block DIR                  two layers, eight experts, 5 MB
    python benchmarks/sglang_models.py glm4 fp8_block DIR --dequantised    the same numbers, written as bf16
    python benchmarks/sglang_models.py dsv3_tp8 fp8_block DIR              config.json only, for --load-format dummy

qwen3moe routes by softmax; glm4 by sigmoid with a bias and groups, a scaling factor of 2.5 and a shared expert, which
is DeepSeek-V3's routing on attention with grouped queries; gptoss has biases, interleaved gate and up, and is the only
one for mxfp4. The same bytes are written every time. Only the routed experts are quantised. No tokenizer is written:
start the server with --skip-tokenizer-init.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torch_moe_ops.formats import FORMATS, quantize_weight

TINY = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "intermediate_size": 512,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
COMMON = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "norm_topk_prob": True,
}
QWEN = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "mlp_only_layers": []}
QWEN |= {"decoder_sparse_step": 1, "use_sliding_window": False}
GLM = {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "n_shared_experts": 1, "use_qk_norm": True}
GLM |= {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "partial_rotary_factor": 0.5}
GLM |= {"num_nextn_predict_layers": 0}

GPT_OSS = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True}
GPT_OSS |= {"swiglu_limit": 7.0, "sliding_window": 128, "rope_theta": 150000.0}
GPT_OSS |= {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}}

# Fewer layers, attention with grouped queries, and DeepSeek-V3's experts: all of their columns, or one rank's of 8.
DSV3 = TINY | {"hidden_size": 7168, "num_hidden_layers": 4, "vocab_size": 32768, "num_attention_heads": 32}
DSV3 |= {"num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 2048, "intermediate_size": 4096}
DSV3 |= {"num_experts": 256, "num_experts_per_tok": 8}
DSV3_TP8 = DSV3 | {"moe_intermediate_size": 256, "num_hidden_layers": 13}
GPT_OSS_20B = DSV3 | {"hidden_size": 2880, "num_hidden_layers": 12, "num_attention_heads": 64, "head_dim": 64}
GPT_OSS_20B |= {"num_key_value_heads": 8, "moe_intermediate_size": 2880, "num_experts": 32, "num_experts_per_tok": 4}
QWEN30B = DSV3 | {"hidden_size": 2048, "num_hidden_layers": 12, "moe_intermediate_size": 768, "num_experts": 128}


@dataclass(frozen=True)
class Family:
    """A model class of SGLang with sizes. `has_weights`: small enough to be written."""

    config: dict
    groups: tuple[int, int] = (1, 1)  # n_group and topk_group of the router
    has_weights: bool = True


FAMILIES = {
    "qwen3moe": Family(TINY | QWEN),
    "glm4": Family(TINY | GLM, (4, 2)),
    "dsv3": Family(DSV3 | GLM, (8, 4), has_weights=False),
    "dsv3_tp8": Family(DSV3_TP8 | GLM, (8, 4), has_weights=False),
    "qwen30b": Family(QWEN30B | QWEN, has_weights=False),
    "gptoss": Family(TINY | GPT_OSS),
    "gptoss20b": Family(GPT_OSS_20B | GPT_OSS, has_weights=False),
}


def make_config(family: Family, checkpoint: str) -> dict:
    config = COMMON | family.config
    if family.config["model_type"] == "glm4_moe":
        config |= {"n_routed_experts": config.pop("num_experts")}
        config |= {"n_group": family.groups[0], "topk_group": family.groups[1]}
    if family.config["model_type"] == "gpt_oss":
        config |= {"num_local_experts": config.pop("num_experts"), "intermediate_size": config["moe_intermediate_size"]}
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [kinds[i % 2] for i in range(config["num_hidden_layers"])]
    config["torch_dtype"] = "float16" if checkpoint == "fp16" else "bfloat16"
    if checkpoint in QUANTISATIONS:
        config["quantization_config"] = QUANTISATIONS[checkpoint](dense_layers(config))
    return config


def dense_layers(config: dict) -> list[str]:
    """The linear layers outside the routed experts, under SGLang's names and those of the checkpoint."""
    names = ["lm_head"]
    for i in range(config["num_hidden_layers"]):
        names += [f"model.layers.{i}.self_attn.{n}_proj" for n in ("q", "k", "v", "o", "qkv")]
        names += [f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp.gate"]
        for mlp in ("mlp", "mlp.shared_experts"):
            names += [f"model.layers.{i}.{mlp}.{n}_proj" for n in ("gate", "up", "down", "gate_up")]
    return names


# quantised experts ----------------------------------------------------------------------------------------------------
# What a checkpoint says about its quantisation, and its tensors for one expert's matrix [N, K]; `parts` is always 1,
# because checkpoints keep gate and up apart.


def fp8(block: list[int] | None, dense: list[str]) -> dict:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": dense}
    return config | ({"weight_block_size": block} if block else {})


def mxfp8(dense: list[str]) -> dict:
    return fp8(None, dense) | {"quant_method": "mxfp8"}


def modelopt_fp8(dense: list[str]) -> dict:
    return {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": dense}


def mxfp4(dense: list[str]) -> dict:
    return {"quant_method": "mxfp4", "modules_to_not_convert": dense}


def int8(dense: list[str]) -> dict:
    return {"quant_method": "w8a8_int8", "is_dynamic": True, "ignore": dense}


def nvfp4(dense: list[str]) -> dict:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": dense}


def compressed_tensors(format: str, weights: dict, activations: dict, dense: list[str]) -> dict:
    numbers = {"dynamic": False, "symmetric": True}
    group = {"targets": ["Linear"], "weights": numbers | weights, "input_activations": numbers | activations}
    config = {"quant_method": "compressed-tensors", "format": format, "ignore": dense}
    return config | {"config_groups": {"group_0": group}}


def bits(number: int, type: str, strategy: str, **more: object) -> dict:
    return {"num_bits": number, "type": type, "strategy": strategy} | more


FP8_BLOCK = (
    bits(8, "float", "block", block_structure=[128, 128]),
    bits(8, "float", "group", group_size=128, dynamic=True),
)
FP8_CHANNEL = (bits(8, "float", "channel"), bits(8, "float", "token", dynamic=True))
INT8 = (bits(8, "int", "channel"), bits(8, "int", "token", dynamic=True))
MXFP4 = (bits(4, "float", "group", group_size=32), bits(4, "float", "group", group_size=32, dynamic=True))
NVFP4 = (
    bits(4, "float", "tensor_group", group_size=16),
    bits(4, "float", "tensor_group", group_size=16, dynamic="local"),
)

QUANTISATIONS: dict[str, Callable[[list[str]], dict]] = {
    "fp8_block": partial(fp8, [128, 128]),
    "fp8_tensor": partial(fp8, None),
    "modelopt_fp8": modelopt_fp8,
    "mxfp8": mxfp8,
    "mxfp4": mxfp4,
    "int8": int8,
    "nvfp4": nvfp4,
    "ct_fp8_block": partial(compressed_tensors, "float-quantized", *FP8_BLOCK),
    "ct_fp8_channel": partial(compressed_tensors, "float-quantized", *FP8_CHANNEL),
    "ct_int8": partial(compressed_tensors, "int-quantized", *INT8),
    "ct_mxfp4": partial(compressed_tensors, "mxfp4-pack-quantized", *MXFP4),
    "ct_nvfp4": partial(compressed_tensors, "nvfp4-pack-quantized", *NVFP4),
}


def quantised(checkpoint: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """weight [N, K] -> (the checkpoint's tensors by suffix, their value in float32)."""
    if checkpoint in ("bf16", "fp16"):
        stored = weight.to(FORMATS[checkpoint].dtype)
        return {"weight": stored}, stored.float()
    if checkpoint in ("fp8_tensor", "modelopt_fp8", "ct_fp8_channel"):
        amax = weight.abs().amax(1, keepdim=True) if checkpoint == "ct_fp8_channel" else weight.abs().amax()
        scale = amax / 448
        values = (weight / scale).to(torch.float8_e4m3fn)
        tensors = {"weight": values, "weight_scale": scale}
        tensors |= {"input_scale": torch.tensor(8 / 448)} if checkpoint == "modelopt_fp8" else {}
        return tensors, values.float() * scale
    format = FORMATS[checkpoint.removeprefix("ct_")]
    values, scale, global_scale = (None if x is None else x[0] for x in quantize_weight(weight[None], format))
    value = format.dequantize(values, scale, format.weight_block, global_scale)
    scale = scale.view(torch.uint8) if format.scale_dtype == torch.float8_e8m0fnu else scale
    tensors = {"weight_packed" if checkpoint == "ct_nvfp4" else "weight": values}
    tensors["weight_scale_inv" if checkpoint in ("fp8_block", "mxfp8") else "weight_scale"] = scale
    if checkpoint == "nvfp4":
        tensors |= {"weight_scale_2": global_scale[0], "input_scale": ACT_GLOBAL_SCALE.clone()}
    if checkpoint == "ct_nvfp4":
        tensors |= {"weight_global_scale": 1 / global_scale, "input_global_scale": 1 / ACT_GLOBAL_SCALE.view(1)}
    return tensors, value


# NVFP4 activations up to 64 keep their size; those of these models are smaller.
ACT_GLOBAL_SCALE = torch.tensor(64 / (6 * 448))


# weights --------------------------------------------------------------------------------------------------------------


class Weights:
    """A checkpoint's tensors, drawn from one generator: the order of the calls fixes the values."""

    def __init__(self, config: dict, checkpoint: str, dequantised: bool) -> None:
        self.config, self.checkpoint, self.dequantised = config, checkpoint, dequantised
        self.dtype = torch.float16 if checkpoint == "fp16" else torch.bfloat16
        self.random = torch.Generator().manual_seed(0)
        self.tensors: dict[str, Tensor] = {}

    def random_tensor(self, *shape: int, size: float) -> Tensor:
        return (torch.randn(*shape, generator=self.random) * size).to(self.dtype)

    def linear(self, name: str, n: int, k: int, gain: float = 1.0, *, bias: bool = False) -> None:
        self.tensors[f"{name}.weight"] = (torch.randn(n, k, generator=self.random) * gain / k**0.5).to(self.dtype)
        if bias:
            self.tensors[f"{name}.bias"] = self.random_tensor(n, size=0.1)

    def norm(self, name: str, n: int) -> None:
        self.tensors[f"{name}.weight"] = (1 + 0.1 * torch.randn(n, generator=self.random)).to(self.dtype)

    def expert(self, name: str, n: int, k: int) -> None:
        weight = torch.randn(n, k, generator=self.random) * 1.5 / k**0.5
        tensors, value = quantised(self.checkpoint, weight)
        if self.dequantised:
            tensors = {"weight": value.to(self.dtype)}
        self.tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def mlp(self, prefix: str, width: int, linear: Callable[[str, int, int], None]) -> None:
        hidden_size = self.config["hidden_size"]
        linear(f"{prefix}.gate_proj", width, hidden_size)
        linear(f"{prefix}.up_proj", width, hidden_size)
        linear(f"{prefix}.down_proj", hidden_size, width)

    def attention(self, prefix: str) -> None:
        hidden_size, head, bias = (self.config[name] for name in ("hidden_size", "head_dim", "attention_bias"))
        queries, keys = (self.config[f"num_{name}_heads"] * head for name in ("attention", "key_value"))
        for name, n in (("q", queries), ("k", keys), ("v", keys)):
            self.linear(f"{prefix}.self_attn.{name}_proj", n, hidden_size, bias=bias)
        self.linear(f"{prefix}.self_attn.o_proj", hidden_size, queries, bias=bias)
        if self.config["model_type"] == "gpt_oss":
            self.tensors[f"{prefix}.self_attn.sinks"] = self.random_tensor(self.config["num_attention_heads"], size=1.0)
        else:
            for name in ("q_norm", "k_norm"):
                self.norm(f"{prefix}.self_attn.{name}", head)
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.norm(f"{prefix}.{name}", hidden_size)

    def moe(self, prefix: str) -> None:
        config = self.config
        num_experts = config.get("num_experts") or config["n_routed_experts"]
        self.linear(f"{prefix}.gate", num_experts, config["hidden_size"], gain=3.0)
        if "n_shared_experts" in config:
            self.tensors[f"{prefix}.gate.e_score_correction_bias"] = (
                torch.randn(num_experts, generator=self.random) * 0.1
            )
            self.mlp(f"{prefix}.shared_experts", config["moe_intermediate_size"], self.linear)
        for e in range(num_experts):
            self.mlp(f"{prefix}.experts.{e}", config["moe_intermediate_size"], self.expert)

    def gpt_oss_moe(self, prefix: str) -> None:
        """All experts of a layer in one tensor; rows of gate and up alternate; bf16 weights are transposed."""
        config = self.config
        num_experts, width, hidden_size = (config[n] for n in ("num_local_experts", "intermediate_size", "hidden_size"))
        self.linear(f"{prefix}.router", num_experts, hidden_size, gain=3.0, bias=True)
        for name, n, k in (("gate_up_proj", 2 * width, hidden_size), ("down_proj", hidden_size, width)):
            weight = torch.randn(num_experts, n, k, generator=self.random) * 1.5 / k**0.5
            name = f"{prefix}.experts.{name}"
            self.tensors[f"{name}_bias"] = self.random_tensor(num_experts, n, size=0.1)
            if self.checkpoint == "mxfp4":
                format = FORMATS["mxfp4"]
                values, scale, _ = quantize_weight(weight, format)
                weight = format.dequantize(values, scale, format.weight_block)
            if self.checkpoint == "mxfp4" and not self.dequantised:
                self.tensors[f"{name}_blocks"] = values.unflatten(2, (k // 32, 16))
                self.tensors[f"{name}_scales"] = scale.view(torch.uint8)
            else:
                self.tensors[name] = weight.to(self.dtype).transpose(1, 2).contiguous()

    def model(self) -> dict[str, Tensor]:
        config, hidden_size = self.config, self.config["hidden_size"]
        self.linear("model.embed_tokens", config["vocab_size"], hidden_size, gain=hidden_size**0.5)
        self.linear("lm_head", config["vocab_size"], hidden_size)
        self.norm("model.norm", hidden_size)
        for i in range(config["num_hidden_layers"]):
            self.attention(f"model.layers.{i}")
            if config["model_type"] == "gpt_oss":
                self.gpt_oss_moe(f"model.layers.{i}.mlp")
            elif i < config.get("first_k_dense_replace", 0):
                self.mlp(f"model.layers.{i}.mlp", config["intermediate_size"], self.linear)
            else:
                self.moe(f"model.layers.{i}.mlp")
        return self.tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("checkpoint", choices=["bf16", "fp16", *QUANTISATIONS], help="how the experts are stored")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dequantised", action="store_true", help="write the quantised numbers as bf16")
    args = parser.parse_args()
    family = FAMILIES[args.family]
    if args.checkpoint != "bf16" and (args.checkpoint == "mxfp4") != (family.config["model_type"] == "gpt_oss"):
        parser.error("mxfp4 is the format of gpt-oss models, which are stored so or in bf16; others take ct_mxfp4")
    if args.directory.exists() and not args.directory.is_dir():
        parser.error(f"directory: expected a directory, got the file {args.directory}")
    args.directory.mkdir(parents=True, exist_ok=True)
    config = make_config(family, "bf16" if args.dequantised else args.checkpoint)
    (args.directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if family.has_weights:
        from safetensors.torch import save_file  # comes with SGLang

        tensors = Weights(config, args.checkpoint, args.dequantised).model()
        save_file(tensors, str(args.directory / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
