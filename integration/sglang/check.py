"""Says, without starting a server, which backend would run a checkpoint's experts with --moe-runner-backend torch_moe.

It reads config.json (and hf_quant_config.json) alone: which layers have experts, their format and sizes on one rank,
and what runs them on this machine. Server flags that matter are read, others ignored. What only SGLang's model code
knows (biases, an activation's constants) is checked when the server loads the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch

from torch_moe_ops.backends import explain_choices
from torch_moe_ops.cli._arguments import positive

from .support import OWN_EXPERTS, act_formats, own_experts, supported

# What the configurations of different models call the same thing, the name to prefer first.
NAMES = {
    "num_experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "experts_per_token"),
    "intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    "hidden_size": ("hidden_size",),
}
MODELOPT_BLOCKS = ("FP8_PB_WO", "FP8_BLOCK_SCALES")  # of 128x128
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16"}


@dataclass(frozen=True)
class ExpertsOfRank:
    """The experts of one layer on one rank."""

    format: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


def read_config(config: dict, tp: int = 1, ep: int = 1, dtype: str = "auto") -> ExpertsOfRank:
    """From a config.json; a ValueError of one sentence says why the adapter would refuse it.

    SGLang's --tp counts all ranks and --ep divides them: tp / ep ranks share an expert.
    """
    text = text_config(config)
    for model in OWN_EXPERTS.intersection(architectures(config)):
        raise ValueError(f"expected {supported()}, got {own_experts(model)}")
    found = {}
    for name, aliases in NAMES.items():
        alias = next((alias for alias in aliases if text.get(alias)), None)
        if alias is None:
            raise ValueError(f"config.json has no {' or '.join(aliases)}: this is no model with experts that we know")
        if type(text[alias]) is not int or text[alias] < 1:
            raise ValueError(f"config.json: {alias}: expected a positive whole number, got {text[alias]!r}")
        found[name] = text[alias]
    if tp % ep or found["num_experts"] % ep or found["intermediate_size"] % (tp // ep):
        raise ValueError(f"--tp {tp} --ep {ep} does not divide {found}")
    found["num_experts"] //= ep
    found["intermediate_size"] //= tp // ep
    experts = ExpertsOfRank(format=read_format(text, dtype), **found)
    if experts.format == "fp8_block" and has_blocks(text) and experts.intermediate_size % 128:
        hint = f": use --ep {tp}" if tp > ep else ""
        raise ValueError(f"128x128 blocks do not fit {experts.intermediate_size} columns on a rank{hint}")
    return experts


def architectures(config: dict) -> list[str]:
    """The model's classes, with the one that SGLang takes for Mixtral in other quantisations than these."""
    names = list(config.get("architectures") or ())
    quantisation = config.get("quantization_config")
    others = quantisation is not None and quantisation.get("quant_method") not in ("fp8", "compressed-tensors")
    return names + ["QuantMixtralForCausalLM"] * (others and "MixtralForCausalLM" in names)


def text_config(config: dict) -> dict:
    """What a model of several kinds of input says of its text, at the top."""
    if not isinstance(config, dict):
        raise ValueError(f"config.json: expected an object, got {type(config).__name__}")
    return {**config, **(config.get("text_config") or {})}


def has_blocks(config: dict) -> bool:
    """Of FP8 experts: whether the checkpoint stores scales of blocks, not of whole tensors."""
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if modelopt_algorithm(quantisation) in MODELOPT_BLOCKS:
        return True
    groups = quantisation.get("config_groups", {}).values()
    strategies = {(group.get("weights") or {}).get("strategy") for group in groups}
    return quantisation.get("weight_block_size") is not None or "block" in strategies


def hidden_format(config: dict, dtype: str = "auto") -> str:
    """Of the hidden states, and of experts that are not quantised."""
    dtype = dtype if dtype != "auto" else str(config.get("dtype") or config.get("torch_dtype"))
    if dtype not in DTYPES:
        raise ValueError(f"expected {supported()}, got {dtype}")
    return DTYPES[dtype]


def read_format(config: dict, dtype: str = "auto") -> str:
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if quantisation is None:
        return hidden_format(config, dtype)
    format, got = _quantised_format(quantisation)
    if format is None:
        raise ValueError(f"expected {supported()}, got {got}")
    return format


def _quantised_format(quantisation: dict) -> tuple[str | None, str]:
    """The format, or None; and what to call it in the refusal."""
    routed = quantisation.get("routed_experts_quant_method") or quantisation.get("moe_quant_algo")
    if routed in ("mxfp4", "NVFP4"):  # the rest is FP8
        return routed.lower(), routed
    method = quantisation.get("quant_method") or "modelopt"  # hf_quant_config.json has no quant_method
    if method == "fp8":
        block = quantisation.get("weight_block_size")
        return ("fp8_block" if block in (None, [128, 128]) else None), f"FP8 with weight_block_size {block}"
    if method == "compressed-tensors":
        group = next(iter(quantisation.get("config_groups", {}).values()), {})
        weights, activations = group.get("weights") or {}, group.get("input_activations") or {}
        return _compressed_format(weights, activations), f"compressed-tensors with {weights} and {activations}"
    if method.startswith("modelopt"):
        algorithm = modelopt_algorithm(quantisation)
        formats = {"FP8": "fp8_block", "MXFP8": "mxfp8"} | dict.fromkeys(MODELOPT_BLOCKS, "fp8_block")
        return "nvfp4" if "NVFP4" in algorithm else formats.get(algorithm), f"ModelOpt's {algorithm}"
    return {"mxfp8": "mxfp8", "mxfp4": "mxfp4", "w8a8_int8": "int8"}.get(method), f"quant_method {method}"


def modelopt_algorithm(quantisation: dict) -> str:
    """Of the experts. SGLang has MXFP8 and FP8 in blocks in mixed precision alone, where each layer names its own."""
    inner = quantisation.get("quantization") or quantisation
    algorithm = str(quantisation.get("quant_algo") or inner.get("quant_algo"))
    if algorithm != "MIXED_PRECISION":
        return f"{algorithm} of all layers" if algorithm in ("MXFP8", *MODELOPT_BLOCKS) else algorithm
    layers = (inner.get("quantized_layers") or {}).items()
    algorithms = {str(layer.get("quant_algo")) for name, layer in layers if ".experts" in name}
    return algorithms.pop() if len(algorithms) == 1 else f"{algorithm}, with experts in no or several formats"


def _compressed_format(weights: dict, activations: dict) -> str | None:
    match weights.get("num_bits"), weights.get("type"), weights.get("strategy"), activations.get("num_bits"):
        case 8, "float", "block", 8:
            return "fp8_block" if weights.get("block_structure") == [128, 128] else None
        case 8, "float", "tensor", 8:
            return "fp8_block"
        case 8, "int", "channel", 8:
            return "int8" if activations.get("dynamic") else None
        case 4, "float", "tensor_group", 4 | None:
            return "nvfp4"
        case 4, "float", "group", _:
            return "mxfp4" if weights.get("group_size") == 32 else None
    return None


def moe_layers(config: dict) -> list[int]:
    """The layers that have experts, as far as config.json tells."""
    config = text_config(config)
    layers = range(config.get("first_k_dense_replace") or 0, config.get("num_hidden_layers") or 0)
    step = config.get("decoder_sparse_step") or config.get("interleave_moe_layer_step") or 1
    dense = config.get("mlp_only_layers") or []
    return [i for i in layers if (i + 1) % step == 0 and i not in dense]


def choose(experts: ExpertsOfRank, hidden: str = "bf16", device: str | None = None) -> list[object]:
    """What each kind of activations gives, up to the first that runs. `hidden`: the format of the hidden states."""
    facts = vars(experts) | {"device": device}
    return explain_choices(facts.pop("format"), act_formats(experts.format, hidden), **facts)


def plugin_line() -> str:
    """Whether SGLang would find the adapter; needs no import of SGLang."""
    try:
        sglang = f"sglang {version('sglang')}"
    except PackageNotFoundError:
        sglang = "sglang is not installed"
    names = [point.name for point in entry_points(group="sglang.srt.plugins")]
    return f"{sglang}; plugins: {', '.join(names) or 'none, install torch_moe_ops with pip'}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The server's flags that decide, under the server's names."""
    parser.add_argument("model_dir", type=Path, help="a directory with a config.json")
    parser.add_argument("--tp", "--tp-size", "--tensor-parallel-size", type=positive, default=1)
    parser.add_argument("--ep", "--ep-size", "--expert-parallel-size", type=positive, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU, if there is one")
    parser.add_argument("--moe-a2a-backend", default="none")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--lora-paths", nargs="*")
    parser.add_argument("--enable-single-batch-overlap", action="store_true")


def refused_flags(args: argparse.Namespace) -> Sequence[str]:
    got = [f"--moe-a2a-backend {args.moe_a2a_backend}"] * (args.moe_a2a_backend != "none")
    got += ["LoRA adapters"] * bool(args.enable_lora or args.lora_paths)
    return got + ["--enable-single-batch-overlap"] * args.enable_single_batch_overlap


def main(args: argparse.Namespace) -> int:
    """Exit status 0: supported; 1: not; 2: no configuration to read."""
    print(plugin_line())
    try:
        config = json.loads((args.model_dir / "config.json").read_text())
        separate = args.model_dir / "hf_quant_config.json"
        if separate.exists() and "quantization_config" not in config:
            config["quantization_config"] = json.loads(separate.read_text())
        experts = read_config(config, args.tp, args.ep, args.dtype)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: expected cpu where there is no CUDA GPU, got cuda")
        for flag in refused_flags(args):
            raise ValueError(f"expected {supported(args.device)}, got {flag}")
        text = text_config(config)
        stated = args.dtype != "auto" or text.get("dtype") or text.get("torch_dtype")
        explanations = choose(experts, hidden_format(text, args.dtype) if stated else "bf16", args.device)
        layers = moe_layers(config)
    except OSError:
        print(f"check: model_dir: expected a directory with a config.json, got {args.model_dir}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError) as error:
        print(f"not supported: {error}")
        return 1
    except (TypeError, AttributeError, ArithmeticError) as error:  # values of kinds that no configuration has
        print(f"not supported: config.json: {type(error).__name__}: {error}")
        return 1
    print(f"{len(layers)} layers with experts: {', '.join(map(str, layers))}" if layers else "no layer has experts")
    print(experts)
    print(*explanations, sep="\n")
    runs = bool(layers and explanations[-1].backend)
    print("supported" if runs else "not supported: no backend runs it on this machine" if layers else "not supported")
    return 0 if runs else 1
