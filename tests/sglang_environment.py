"""SGLang on a CPU, for tests: its environment, its flags and its checkpoints.

The environment is a virtual environment on top of the running one, whose torch, triton and torch_moe_ops it sees.
SGLang comes without its GPU packages; integration/sglang_cpu/ holds what it misses on a CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CPU = HERE / "integration/sglang_cpu"
MODELS = HERE.parent / "benchmarks/sglang_models.py"
PROBE = "sglang==0.5.21"  # decides whether pip can install anything here
INSTALL_SECONDS = 600
FLAGS = (
    "--device cpu --skip-tokenizer-init --attention-backend torch_native --sampling-backend pytorch "
    "--disable-overlap-schedule --disable-radix-cache --max-total-tokens 4096 --max-running-requests 24 "
    "--context-length 512 --skip-server-warmup"
).split()


def make_environment(folder: Path) -> Path:
    """-> its Python; skips the test where pip finds no SGLang for this machine."""
    python = folder / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=INSTALL_SECONDS)
    own = next((folder / "lib").glob("python*/site-packages"))
    seen = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    lines = (f"import site; site.addsitedir({path!r})\n" for path in seen)  # unlike a bare path: editable installs too
    (own / "running_environment.pth").write_text("".join(lines))
    pip = [python, "-m", "pip", "install", "--quiet", "--no-input", "--retries", "2"]
    options = {"capture_output": True, "text": True, "timeout": INSTALL_SECONDS}
    probe = subprocess.run([*pip, "--no-deps", PROBE], **options)
    if probe.returncode:
        pytest.skip(f"pip cannot install {PROBE} here: {(probe.stderr.strip().splitlines() or ['no message'])[-1]}")
    for arguments in (["-r", CPU / "requirements.txt"], ["--no-deps", "-r", CPU / "requirements-nodeps.txt"]):
        installed = subprocess.run([*pip, *arguments], **options)
        assert installed.returncode == 0, installed.stderr
    return python


def environment(**variables: str) -> dict[str, str]:
    """SGLang binds ranks to cores, and does not guess which on a machine with one NUMA node: hence `0|1`."""
    return os.environ | {"PYTHONPATH": str(CPU), "SGLANG_CPU_OMP_THREADS_BIND": "0|1", **variables}


def make_model(python: Path, folder: Path, family: str, checkpoint: str, *options: str) -> Path:
    command = [python, MODELS, family, checkpoint, folder, *options]
    subprocess.run(command, check=True, timeout=INSTALL_SECONDS, env=environment())
    return folder
