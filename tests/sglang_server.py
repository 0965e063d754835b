"""A real SGLang server on a CPU, for tests: its environment, its start and its end, and what it answers.

The environment is a virtual environment on top of the running one, whose torch, triton and torch_moe_ops it sees.
SGLang comes without its GPU packages; integration/sglang_cpu/ holds what it misses on a CPU.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CPU = HERE / "integration/sglang_cpu"
MODELS = HERE.parent / "benchmarks/sglang_models.py"
PROBE = "sglang==0.5.21"  # decides whether pip can install anything here
INSTALL_SECONDS, START_SECONDS, ANSWER_SECONDS = 600, 240, 120
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
    subprocess.run(command, check=True, timeout=START_SECONDS, env=environment())
    return folder


@dataclass(frozen=True)
class Answer:
    """A greedy completion: its tokens, and by how much each was more probable than the second (log-probabilities)."""

    tokens: list[int]
    margins: list[float]


class Server:
    """`with Server(...) as server` waits until it answers, and kills it at the end.

    The server and its children are a process group, which `timeout` ends, should nobody else.
    """

    def __init__(self, python: Path, model: Path, log: Path, *flags: str, **variables: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = ["timeout", "--signal=KILL", str(START_SECONDS + 4 * ANSWER_SECONDS), python]
        command += ["-m", "sglang.launch_server", "--model-path", model, "--port", self.url.rpartition(":")[2]]
        self.log = log
        with log.open("w") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(
                [*command, *FLAGS, *flags], **streams, start_new_session=True, env=environment(**variables)
            )

    def __enter__(self) -> Server:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/health", wait=5)
                return self
            except OSError:  # not there yet, or not ready
                time.sleep(0.5)
        self.stop()
        raise AssertionError(f"no server; its log ends with\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *_: object) -> None:
        self.stop()

    def refusal(self) -> str:
        """The log of a server that must not start."""
        try:
            status = self.process.wait(START_SECONDS)
        finally:
            self.stop()
        assert status, f"it ended without an error; its log ends with\n{self.log.read_text()[-4000:]}"
        return self.log.read_text()

    def stop(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def get(self, path: str, body: bytes | None = None, wait: float = ANSWER_SECONDS) -> bytes:
        """The answer, to a POST request if there is a body; urllib's HTTPError is an OSError."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=wait) as answer:
            return answer.read()

    def status(self, path: str, body: bytes) -> int:
        try:
            self.get(path, body)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def complete(self, prompts: list[list[int]], new_tokens: int) -> list[Answer]:
        parameters = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompts, "sampling_params": parameters, "return_logprob": True, "top_logprobs_num": 2}
        results = json.loads(self.get("/generate", json.dumps(body).encode()))
        margins = [[a[0] - b[0] for a, b in result["meta_info"]["output_top_logprobs"]] for result in results]
        return [Answer(result["output_ids"], margin) for result, margin in zip(results, margins, strict=True)]

    def kill_scheduler(self) -> int:
        """Kills the process that runs the model; -> the exit status of the server."""
        commands = ((int(path.parent.name), path.read_text()) for path in Path("/proc").glob("[0-9]*/cmdline"))
        schedulers = [process for process, command in commands if command.startswith("sglang::scheduler")]
        [process] = [process for process in schedulers if os.getpgid(process) == self.process.pid]
        os.kill(process, signal.SIGKILL)
        return self.process.wait(ANSWER_SECONDS)
