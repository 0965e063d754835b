"""Show what was built, what runs here, and which GPUs each format is fast on.

`info` prints build_info() and the versions of this machine, `info --json` the same as JSON, and `info --table` the
Markdown table of formats x GPUs that README.md carries: cell = the backends that accept the pair, best first.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ..build_info import build_info


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


def main(args: argparse.Namespace) -> int:
    info = collect()
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    build = info.pop("build")
    for name, value in [*info.items(), *((f"build.{name}", value) for name, value in build.items())]:
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:22} {text if text not in (None, '') else '-'}")
    return 0
