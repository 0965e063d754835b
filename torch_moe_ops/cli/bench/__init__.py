"""Time fused_moe, and if asked its stages and its host time, on a GPU; `bench compare` sets result files side by side.

A point (case, format, tokens, routing) is the median of CUDA-graph replays. One graph holds several calls on inputs
with different routings, so that small weights do not stay in the L2 cache. Every point is checked in the same run,
after its replays, on 48 tokens against a float32 loop over the dequantised weights. Exit status 1: a point is wrong or
failed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from ...backends import CANDIDATES
from ...experts import Experts
from ...formats import FORMATS
from .. import _layer
from .._arguments import names_of, not_negative, numbers
from .._run import WRITABLE, opened
from . import compare
from .host import measure_host_call
from .measure import GRAPH_CALLS, Point, measure_fused_moe, one_line
from .results import ResultFile, environment
from .stages import GEMMS, measure_stages

TOKENS = tuple(GRAPH_CALLS)
MOST_TOKENS_TINY = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases",
        type=case_names,
        default=list(_layer.CASE_GROUPS["default"]),
        help=f"names of cases or groups ({','.join(_layer.CASE_GROUPS)})",
    )
    parser.add_argument("--formats", type=names_of(FORMATS), default=["bf16", "fp8_block"], help="bf16,fp8_block")
    parser.add_argument("--act-format", default="", choices=FORMATS, help="of the activations (default: the weights')")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, help=",".join(map(str, TOKENS)))
    parser.add_argument("--routing", choices=_layer.ROUTINGS, default="uniform", help="how often each expert is drawn")
    parser.add_argument("--stages", action="store_true", help="time each stage op as well")
    parser.add_argument("--gemm", action="store_true", help="of the stages time the two grouped GEMMs only")
    parser.add_argument("--host", action="store_true", help="measure the host time of an eager call as well")
    parser.add_argument(
        "--backend", choices=CANDIDATES["fused_moe"], help="force an overload (default: the chosen one)"
    )
    parser.add_argument(
        "--budget-s", type=not_negative, default=math.inf, help="start no point after this many seconds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON Lines")
    parser.add_argument("--commit", help="recorded in the results (default: the build's, else git's HEAD)")
    parser.add_argument(
        "--tiny", action="store_true", help="one small layer, on the CPU if there is no GPU: a self-test"
    )
    reports = parser.add_subparsers(title="reports", metavar="compare")
    compare.add_parser(reports)


def case_names(text: str) -> list[str]:
    """An argparse type: a comma-separated list of cases and groups of cases -> the cases, each once."""
    names = names_of([*_layer.CASES, *_layer.CASE_GROUPS])(text)
    return list(dict.fromkeys(case for name in names for case in _layer.CASE_GROUPS.get(name, (name,))))


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available() and not args.tiny:
        print("bench: device: expected a CUDA GPU, got none (--tiny runs a small layer on the CPU)", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [_layer.TINY] if args.tiny else [_layer.CASES[name] for name in args.cases]
    tokens = [n for n in args.tokens if n <= MOST_TOKENS_TINY] if args.tiny else args.tokens
    if not tokens:
        print(f"bench: --tokens: expected at most {MOST_TOKENS_TINY} with --tiny, got {args.tokens}", file=sys.stderr)
        return 2
    if args.host and device == "cpu":
        print("bench: --host: expected a CUDA GPU, got none (no host time is measured)", file=sys.stderr)
    started = time.monotonic()
    bad = skipped = 0
    with opened("--json", WRITABLE):
        file = ResultFile(args.json, environment(args.commit))
    with file as results, torch.no_grad():
        print(Point.HEADER, flush=True)
        for case in cases:
            for format in args.formats:
                experts = None
                for num_tokens in tokens:
                    if time.monotonic() - started > args.budget_s:
                        skipped += 1
                        continue
                    try:
                        experts = experts or _layer.make_experts(case, format, args.act_format, device)
                        points = points_at(args, case, experts, num_tokens)
                    except RuntimeError as error:  # such weights do not go with such activations, or with this memory
                        points = [failed(args, case, format, num_tokens, error)]
                    for point in points:
                        print(point, flush=True)
                        results.write(point)
                        bad += not point.ok
                        if "CUDA error" in (point.error or ""):
                            print("bench: the CUDA context is lost; stopped", file=sys.stderr)
                            return 1
    if skipped:
        print(f"bench: {skipped} points skipped: the budget of {args.budget_s:g} s is spent", file=sys.stderr)
    return 1 if bad else 0


def failed(
    args: argparse.Namespace, case: _layer.Case, format: str, tokens: int, error: Exception, what: str = "fused_moe"
) -> Point:
    formats = dict(format=format, act_format=args.act_format or format)
    facts = dict(what=what, case=case.name, **formats, tokens=tokens, routing=args.routing)
    return Point(**facts, backend=args.backend, error=one_line(error))


def points_at(args: argparse.Namespace, case: _layer.Case, experts: Experts, num_tokens: int) -> list[Point]:
    what = (case, experts, num_tokens, args.backend, args.routing)
    points = [measure_fused_moe(*what)]
    if not points[0].ok:
        return points
    if args.stages or args.gemm:
        try:
            points += measure_stages(*what, timed=None if args.stages else GEMMS)
        except RuntimeError as error:  # what the fused kernel takes may be nobody's GEMM
            points.append(failed(args, case, experts.format, num_tokens, error, "stages"))
    if args.host and experts.w13.is_cuda:
        try:
            points.append(measure_host_call(*what))
        except RuntimeError as error:
            points.append(failed(args, case, experts.format, num_tokens, error, "host_call"))
    return points
