"""Show what was built, what this machine has, and which backends take which format.

`info` prints build_info() and the versions of this machine, `info --json` the same as JSON, and `info --table` the
Markdown table in README.md: cell (format, GPU) = the backends of grouped_gemm that take the pair, best first.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ..backends import CANDIDATES, GPU_FORMATS, Problem, explain_problem
from ..build_info import build_info
from ..formats import FORMATS

TABLE_OP = "grouped_gemm"  # where a problem spends its time; the other ops have a CUDA kernel for every GPU
TABLE_GPUS = {
    80: "A100 (sm80)",
    89: "L40S, RTX 40 (sm89)",
    90: "H100, H200 (sm90)",
    100: "B200 (sm100)",
    103: "B300 (sm103)",
    120: "RTX 50 (sm120)",
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


def backends_taking(format: str, sm: int) -> list[str]:
    """The GPU backends that take a format on a GPU, in preference order, given a build for all families."""
    if format not in GPU_FORMATS:
        return []
    problem = Problem(TABLE_OP, "cuda", sm, frozenset(CANDIDATES[TABLE_OP]), format, gemms=((4096, 7168),))
    return [verdict.backend for verdict in explain_problem(problem).verdicts if verdict.reason is None]


def table() -> str:
    header = ["format", "CPU", *TABLE_GPUS.values()]
    rows = [header, ["---"] * len(header)]
    for format in FORMATS:
        cells = [", ".join(backends_taking(format, sm)) or "-" for sm in TABLE_GPUS]
        rows.append([format, "reference", *cells])
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
