"""Says, without starting a server, whether a checkpoint's experts can run with --moe-runner-backend torch_moe.

It reads config.json alone: the experts' format and sizes on one rank, and the backend that runs them on this machine.
What only SGLang's model code knows (biases, an activation's constants) is checked when the server loads the model.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch_moe_ops as moe

from .support import SUPPORTED

# What the configurations of different models call the same thing, the name to prefer first.
NAMES = {
    "num_experts": ("num_experts", "n_routed_experts", "num_local_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk"),
    "intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    "hidden_size": ("hidden_size",),
}
DTYPES = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class ExpertsOfRank:
    """The experts of one layer on one rank."""

    format: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


def read_config(config: dict, tp: int = 1, ep: int = 1) -> ExpertsOfRank:
    """From a config.json; a ValueError of one sentence says why the adapter would refuse it.

    SGLang's --tp counts all ranks and --ep divides them: tp / ep ranks share an expert.
    """
    config = {**config, **config.get("text_config", {})}
    found = {}
    for name, aliases in NAMES.items():
        value = next((config[alias] for alias in aliases if config.get(alias)), None)
        if value is None:
            raise ValueError(f"config.json has no {' or '.join(aliases)}: this is no model with experts that we know")
        found[name] = value
    if tp % ep or found["num_experts"] % ep or found["intermediate_size"] % (tp // ep):
        raise ValueError(f"--tp {tp} --ep {ep} does not divide {found}")
    found["num_experts"] //= ep
    found["intermediate_size"] //= tp // ep
    experts = ExpertsOfRank(format=_format(config), **found)
    if experts.format == "fp8_block" and experts.intermediate_size % 128:
        raise ValueError(f"128x128 blocks do not fit {experts.intermediate_size} columns on a rank: use --ep {tp}")
    return experts


def _format(config: dict) -> str:
    quantisation = config.get("quantization_config")
    if quantisation is None:
        dtype = config.get("dtype") or config.get("torch_dtype")
        if dtype not in DTYPES:
            raise ValueError(f"expected {SUPPORTED}, got {dtype}")
        return DTYPES[dtype]
    method, block = quantisation.get("quant_method"), quantisation.get("weight_block_size")
    if method != "fp8" or block != [128, 128]:
        raise ValueError(f"expected {SUPPORTED}, got quant_method {method} with weight_block_size {block}")
    return "fp8_block"


def plugin_line() -> str:
    """Whether SGLang would find the adapter; needs no import of SGLang."""
    try:
        sglang = f"sglang {version('sglang')}"
    except PackageNotFoundError:
        sglang = "sglang is not installed"
    names = [point.name for point in entry_points(group="sglang.srt.plugins")]
    return f"{sglang}; plugins: {', '.join(names) or 'none, install torch_moe_ops with pip'}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=Path, help="a directory with a config.json")
    parser.add_argument("--tp", type=int, default=1, help="the server's --tp")
    parser.add_argument("--ep", type=int, default=1, help="the server's --ep")


def main(args: argparse.Namespace) -> int:
    """Exit status 0: supported; 1: not."""
    print(plugin_line())
    try:
        experts = read_config(json.loads((args.model_dir / "config.json").read_text()), args.tp, args.ep)
    except (ValueError, OSError) as error:
        print(f"not supported: {error}")
        return 1
    explanation = moe.explain("fused_moe", **vars(experts))
    print(experts)
    print(explanation)
    print("supported" if explanation.backend else "not supported: no backend runs it on this machine")
    return 0 if explanation.backend else 1
