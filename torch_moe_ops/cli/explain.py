"""Say which backend runs a problem, and why each other one does not.

Facts left out raise no objection. --sm asks about a GPU other than the one of this machine, with the kernels of this
build; without a GPU and without --sm the question is about the CPU.
"""

from __future__ import annotations

import argparse
import json

import torch

from ..activations import ACTIVATIONS
from ..backends import OPS, explain
from ..formats import FORMATS
from ..meta_kernels._check import FLOATS
from ._arguments import positive
from ._run import Refused

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", default="fused_moe", choices=OPS)
    parser.add_argument("--format", default="bf16", choices=FORMATS, help="of the weights (default: bf16)")
    parser.add_argument("--act-format", default="", choices=FORMATS, help="of the activations (default: the weights')")
    parser.add_argument("--activation", default="silu", choices=ACTIVATIONS)
    parser.add_argument("--hidden", type=positive, metavar="H", help="hidden size, of fused_moe")
    parser.add_argument("--intermediate", type=positive, metavar="I", help="intermediate size, of fused_moe")
    parser.add_argument("--n", type=positive, help="rows of a weight, of grouped_gemm")
    parser.add_argument("--k", type=positive, help="columns of a weight, of grouped_gemm")
    parser.add_argument("--b-parts", type=positive, default=1, help="parts of a weight's rows, of grouped_gemm")
    parser.add_argument("--experts", type=positive, metavar="E", help="local experts")
    parser.add_argument("--top-k", type=positive, metavar="K", help="experts a token goes to")
    parser.add_argument("--out-dtype", choices=DTYPES, help="of the output")
    parser.add_argument("--bias-dtype", choices=DTYPES, help="of the bias")
    parser.add_argument("--packed", action="store_true", help="the weights are results of pack_weight")
    parser.add_argument("--sm", type=positive, help="compute capability without the dot, 90 for an H100 or H200")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    try:
        explanation = explain(
            args.op,
            device="cuda" if args.sm is not None or torch.cuda.is_available() else "cpu",
            sm=args.sm,
            format=args.format,
            act_format=args.act_format,
            activation=args.activation,
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            n=args.n,
            k=args.k,
            b_parts=args.b_parts,
            num_experts=args.experts,
            top_k=args.top_k,
            out_dtype=DTYPES.get(args.out_dtype),
            bias_dtype=DTYPES.get(args.bias_dtype),
            packed=args.packed,
        )
    except RuntimeError as error:  # no backend could be asked
        raise Refused(error) from None
    if args.json:
        problem = explanation.problem._asdict() | {"built": sorted(explanation.problem.built)}
        problem |= {"out_dtype": args.out_dtype, "bias_dtype": args.bias_dtype}
        verdicts = [{"backend": verdict.backend, "reason": verdict.reason} for verdict in explanation.verdicts]
        print(json.dumps({"problem": problem, "backend": explanation.backend, "verdicts": verdicts}, indent=2))
    else:
        print(explanation)
    return 0 if explanation.backend else 1
