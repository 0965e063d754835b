"""Show what was built, what this machine has, and which backends take which format.

`info` prints build_info() and the versions of this machine, `info --json` the same as JSON, and `info --table` the
Markdown table in README.md: cell (format, GPU) = the backends of grouped_gemm that take the pair, best first; before
them those that take packed weights, with the activations that there is a layout for, and those that fused_moe rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch

from ..backends import CANDIDATES, Problem, explain_problem
from ..build_info import build_info
from ..formats import FORMATS
from ..packed_weights import PACKED_DTYPES, ROUNDED_ACTS

TABLE_OP = "grouped_gemm"  # where a problem spends its time; the other ops have a CUDA kernel for every GPU
TABLE_GPUS = {
    "A100, L40S, RTX 30/40 (sm80-89)": (80, 86, 89),
    "H100, H200 (sm90)": (90,),
    "B200, B300 (sm100-103)": (100, 103),
    "RTX 50 (sm120)": (120,),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="print JSON")
    what.add_argument("--table", action="store_true", help="print the Markdown table of formats and GPUs")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpus() -> list[str]:
    """One line a GPU, such as "NVIDIA H200 (sm90, 139 GiB)"."""
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{gpu.name} (sm{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in properties]


def collect() -> dict[str, object]:
    return {
        "version": installed("torch_moe_ops"),
        "build": build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": installed("triton"),
        "gpus": gpus(),
    }


def backends_taking(format: str, sms: tuple[int, ...], op: str = TABLE_OP, **facts: object) -> list[str]:
    """The backends that take a format on all these GPUs, in preference order, given a build for all families."""
    built = frozenset(CANDIDATES[op])
    explanations = [explain_problem(Problem(op, "cuda", sm, built, format, **facts)) for sm in sms]
    refusals = {verdict.backend for each in explanations for verdict in each.verdicts if verdict.reason}
    return [backend for backend in CANDIDATES[op] if backend not in refusals]


def cell(format: str, sms: tuple[int, ...]) -> str:
    def taking(act_formats: Iterable[str], op: str) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for act_format in act_formats:
            for name in backends_taking(format, sms, op, act_format=act_format, packed=True):
                names.setdefault(name, []).append(act_format)
        return names

    rounded = taking(ROUNDED_ACTS.get(format, ()), "fused_moe")
    names = []
    for name, act_formats in taking(PACKED_DTYPES.get(format, ()), TABLE_OP).items():
        in_fused_moe = f"; in fused_moe {', '.join(rounded[name])}" if name in rounded else ""
        names.append(f"{name} ({', '.join(act_formats)} activations{in_fused_moe})")
    return ", ".join(names + backends_taking(format, sms)) or "-"


def table() -> str:
    header = ["format", "CPU", *TABLE_GPUS]
    rows = [header, ["---"] * len(header)]
    for format in FORMATS:
        rows.append([format, "reference", *(cell(format, sms) for sms in TABLE_GPUS.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(args: argparse.Namespace) -> int:
    if args.table:
        print(table())
        return 0
    info = collect()
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    build = info.pop("build")
    for name, value in [*info.items(), *((f"build.{name}", value) for name, value in build.items())]:
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:22} {text if text not in (None, '') else '-'}")
    return 0
