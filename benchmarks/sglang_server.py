"""One SGLang server: its start and its end, and what it answers. For benchmarks and tests; needs Python alone."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PORTS = range(20000, 30000)  # Linux hands out 32768 to 60999, IANA's range is 49152 to 65535


@dataclass(frozen=True)
class Answer:
    """A greedy completion: its tokens, their log-probabilities, and how much less probable each second choice was."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]


def reserve_port() -> tuple[int, socket.socket]:
    """One that nothing listens on, and that no system hands out by itself: until the server listens there, its own
    ranks have opened many connections, and one of these may get any port above.

    No other process gets it from here until the socket, a datagram one of this number, is closed: servers of two tests
    that ran at a time once had the same port.
    """
    for port in random.sample(PORTS, len(PORTS)):
        reservation = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            reservation.bind(("127.0.0.1", port))
            with socket.socket() as free:
                free.bind(("127.0.0.1", port))
            return port, reservation
        except OSError:
            reservation.close()
    raise RuntimeError(f"each of the ports {PORTS.start} to {PORTS.stop - 1} is taken")


class Server:
    """`with Server(...) as server` waits until it answers, and kills it at the end.

    The server and its children are a process group, which `timeout` ends after `life` seconds, should nobody else.
    """

    def __init__(
        self,
        python: str | Path,
        model: Path,
        log: Path,
        flags: Sequence[str],
        env: dict[str, str] | None = None,
        *,
        start: float = 240,
        life: float = 900,
        patience: float = 120,
    ) -> None:
        """`start`: seconds until it must answer; `patience`: seconds that one answer may take."""
        port, self.reservation = reserve_port()
        self.url = f"http://127.0.0.1:{port}"
        command = ["timeout", "--signal=KILL", str(life), python, "-m", "sglang.launch_server"]
        command += ["--model-path", model, "--port", str(port), *flags]
        self.log, self.start, self.patience = log, start, patience
        with log.open("w") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, **streams, start_new_session=True, env=env)

    def __enter__(self) -> Server:
        end = time.monotonic() + self.start
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/health", patience=5)
                return self
            except OSError:  # not there yet, or not ready
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"no server; its log ends with\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *_: object) -> None:
        self.stop()

    def refusal(self) -> str:
        """The log of a server that must not start."""
        try:
            status = self.process.wait(self.start)
        finally:
            self.stop()
        if not status:
            raise RuntimeError(f"it ended without an error; its log ends with\n{self.log.read_text()[-4000:]}")
        return self.log.read_text()

    def stop(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.reservation.close()

    def get(self, path: str, body: bytes | None = None, patience: float | None = None) -> bytes:
        """The answer, to a POST request if there is a body; urllib's HTTPError is an OSError."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=patience or self.patience) as answer:
            return answer.read()

    def status(self, path: str, body: bytes) -> int:
        try:
            self.get(path, body)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def info(self) -> dict:
        return json.loads(self.get("/get_server_info"))

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, **options: object) -> list[dict]:
        """SGLang's results for all prompts in one request, greedy, without an end of sequence."""
        parameters = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": prompts, "sampling_params": parameters, **options}
        return json.loads(self.get("/generate", json.dumps(body).encode()))

    def complete(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        results = self.generate(prompts, new_tokens, return_logprob=True, top_logprobs_num=2)
        return [read_answer(result) for result in results]

    def kill_scheduler(self) -> int:
        """Kills the process that runs the model; -> the exit status of the server."""
        commands = ((int(path.parent.name), path.read_bytes()) for path in Path("/proc").glob("[0-9]*/cmdline"))
        schedulers = [process for process, command in commands if command.startswith(b"sglang::scheduler")]
        [process] = [process for process in schedulers if os.getpgid(process) == self.process.pid]
        os.kill(process, signal.SIGKILL)
        return self.process.wait(self.patience)


def read_answer(result: dict) -> Answer:
    meta = result["meta_info"]
    margins = [first[0] - second[0] for first, second in meta["output_top_logprobs"]]
    return Answer(result["output_ids"], [entry[0] for entry in meta["output_token_logprobs"]], margins)


# Requests that a server must refuse, and survive.
GARBAGE = (b"{", b"[]", b'{"input_ids": "x"}', b'{"input_ids": [1], "sampling_params": {"top_p": 9}}')
