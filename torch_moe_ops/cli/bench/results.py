"""Result files: JSON Lines. The first object describes the run, every other one is a point.

{"commit": ..., "gpu": ..., "driver": ..., "torch": ..., "triton": ..., "date": ...}
{"what": "fused_moe", "case": ..., "format": ..., "tokens": ..., "routing": ..., "us": ..., "tbps": ..., ...}
"""

from __future__ import annotations

import json
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import torch

from ...build_info import build_info
from .._run import Refused
from ..info import installed
from .measure import Point

ROOT = Path(__file__).resolve().parents[3]


def environment(commit: str | None = None) -> dict[str, object]:
    """What a reader must know to repeat the run."""
    on_gpu = torch.cuda.is_available()
    return {
        "commit": commit or build_info()["commit"] or git_head() or "unknown",  # the kernels' rather than the tree's
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def git_head() -> str | None:
    """The commit of the source tree this package was imported from."""
    return _output("git", "-C", str(ROOT), "rev-parse", "HEAD") if (ROOT / ".git").exists() else None


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = result.stdout.split("\n")
    return lines[0].strip() or None


class ResultFile:
    """Writes points as they come, so that an interrupted run keeps what it has measured. No path: writes nothing."""

    def __init__(self, path: Path | None, header: dict[str, object]) -> None:
        self.file = None if path is None else path.open("w")
        self.write_record(header)

    def write(self, point: Point) -> None:
        self.write_record(point.record())

    def write_record(self, record: dict[str, object]) -> None:
        if self.file is not None:
            print(json.dumps(record), file=self.file, flush=True)

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.file is not None:
            self.file.close()


def read_results(path: Path) -> tuple[dict[str, object], list[dict[str, object]]]:
    """-> (header, points)"""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: expected JSON Lines, got {error.reason}") from None
    except json.JSONDecodeError as error:
        raise Refused(f"{path}: expected JSON Lines, got {error}") from None
    if not records or not all(isinstance(record, dict) for record in records):
        raise Refused(
            f"{path}: expected a result file, a JSON object a line, got {type((records or [None])[0]).__name__}"
        )
    return records[0], records[1:]
