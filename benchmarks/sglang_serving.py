#!/usr/bin/env python3
"""SGLang servers with different --moe-runner-backend on the same machine: how fast, and do they say the same.

    python benchmarks/sglang_serving.py speed MODEL --backends torch_moe,triton,deep_gemm --json speed.jsonl
    python benchmarks/sglang_serving.py check MODEL --backends triton,torch_moe --json check.jsonl
    python benchmarks/sglang_serving.py check MODEL ... --flags="--enable-torch-compile"           more server flags

MODEL is a directory made by sglang_models.py. One with a configuration alone is given random weights, the same for
every backend (--load-format dummy with the plugin in sglang_dummy/). CUDA graphs are on, unless --flags turns them off.
The servers run one after another (or all --together); each has --start seconds to come up, and a backend whose server
does not is reported and left out. Output: one JSON object per line, the first describes the run, appended to the file
as they come.

speed   For every batch size, that many random prompts in one request, as often as --repeat says; medians of
          ttft_s                  seconds for the same prompts with one output token
          output_tokens_per_s     all output tokens / seconds of the request
          decode_tokens_per_s     the tokens after the first / the seconds after ttft_s
        --together: all servers wait on the same GPU, and every batch size is measured on one after the other, so that
        nothing that changes in between can favour a backend. --flags="--max-total-tokens N" lets their caches fit.
check   Against the first backend: greedy tokens (a difference counts if it is no near tie), the first token's log-
        probability; then for every backend: many concurrent requests of mixed lengths, a prompt alone and in a batch of
        64, garbage requests, and the end of the server when its scheduler is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path

from sglang_server import GARBAGE, Answer, Server

DUMMY = Path(__file__).resolve().parent / "sglang_dummy"
VOCABULARY = 1000  # token ids are drawn below it: every model has them
GPU_FLAGS = (
    "--skip-tokenizer-init --attention-backend triton --sampling-backend pytorch --disable-radix-cache "
    "--skip-server-warmup --context-length 4096"
).split()
MIXED_REQUESTS, MIXED_AT_ONCE = 200, 200
CROWD = 64
TIE = 0.3  # the first two tokens' log-probabilities differ by less: another arithmetic may choose the other


# ---- servers ---------------------------------------------------------------------------------------------------------


class Run:
    """The arguments, and the file that the results go to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.began = time.monotonic()
        self.failed = False

    def write(self, **record: object) -> None:
        rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in record.items()}
        line = json.dumps(rounded)
        print(f"[{time.monotonic() - self.began:6.1f} s] {line}", flush=True)
        if self.args.json:
            with self.args.json.open("a") as file:
                file.write(line + "\n")

    def header(self) -> None:
        args = self.args
        self.write(
            what="header",
            command=args.command,
            model=args.model.name,
            config=json.loads((args.model / "config.json").read_text()),
            machine=machine(),
            backends=args.backends,
            flags=self.flags("BACKEND"),
            together=args.together,
            random_weights=self.is_dummy(),
            date=time.strftime("%Y-%m-%d"),
        )

    def is_dummy(self) -> bool:
        return not any(self.args.model.glob("*.safetensors"))

    def flags(self, backend: str) -> list[str]:
        args = self.args
        flags = [*GPU_FLAGS, "--mem-fraction-static", str(args.memory), "--max-running-requests", str(args.running)]
        flags += ["--load-format", "dummy"] * self.is_dummy()
        flags += [] if args.device == "cpu" else ["--cuda-graph-max-bs-decode", str(args.running)]
        return flags + ["--device", args.device, "--moe-runner-backend", backend, *args.flags]

    def each_server(self, work: Callable[[str, Server], None]) -> None:
        """work(backend, server) with every backend's server; a backend that fails is reported and left out."""
        for backend in self.args.backends:
            with self.reported(backend):
                began = time.monotonic()
                with self.launch(backend) as server:
                    self.started(backend, server, began)
                    work(backend, server)

    @contextmanager
    def all_servers(self) -> Iterator[dict[str, Server]]:
        """The servers of all backends at once; one that fails to start is reported and left out."""
        began, servers = time.monotonic(), {}
        launched = {backend: self.launch(backend) for backend in self.args.backends}
        with ExitStack() as stack:
            for server in launched.values():
                stack.callback(server.stop)
            for backend, server in launched.items():
                with self.reported(backend):
                    stack.enter_context(server)
                    self.started(backend, server, began)
                    servers[backend] = server
            yield servers

    def launch(self, backend: str) -> Server:
        args = self.args
        log = args.logs / f"{args.model.name}-{backend}.log"
        path = os.pathsep.join([*args.path, *[str(DUMMY)] * self.is_dummy(), os.environ.get("PYTHONPATH", "")])
        env = dict(os.environ, PYTHONPATH=path)
        options = {"start": args.start, "life": args.life, "patience": args.patience}
        return Server(args.python, args.model, log, self.flags(backend), env, **options)

    def started(self, backend: str, server: Server, began: float) -> None:
        runs = server.info()["moe_runner_backend"]
        self.write(what="start", backend=backend, seconds=time.monotonic() - began, moe_runner_backend=runs)

    @contextmanager
    def reported(self, backend: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, HTTPException, subprocess.TimeoutExpired) as error:
            self.failed = True
            self.write(what="failed", backend=backend, why=f"{type(error).__name__}: {str(error)[-1500:]}")


def machine() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    code = "import torch, sglang; print(torch.__version__, sglang.__version__)"
    versions = output([sys.executable, "-c", code]).split()
    names = dict(zip(("torch", "sglang"), versions[-2:], strict=False))
    code = "from torch_moe_ops.build_info import build_info; print(build_info()['commit'])"
    names["commit"] = output([sys.executable, "-c", code]) or "unknown"
    return {"gpu": output(query) or "none", "cpu": platform.processor() or platform.machine(), **names}


def output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def make_prompts(count: int, length: int | tuple[int, int], seed: int) -> list[list[int]]:
    """Random token ids; a pair is the range of lengths."""
    numbers = random.Random(seed)
    low, high = (length, length) if isinstance(length, int) else length
    return [[numbers.randrange(3, VOCABULARY) for _ in range(numbers.randint(low, high))] for _ in range(count)]


# ---- speed -----------------------------------------------------------------------------------------------------------


def timed(server: Server, prompts: list[list[int]], new_tokens: int) -> float:
    began = time.monotonic()
    results = server.generate(prompts, new_tokens)
    seconds = time.monotonic() - began
    if any(len(result["output_ids"]) != new_tokens for result in results):
        raise RuntimeError(f"expected {new_tokens} tokens of each prompt")
    return seconds


def measure(server: Server, batch: int, args: argparse.Namespace) -> dict[str, object]:
    firsts, wholes = [], []
    for repeat in range(args.warmup + args.repeat):
        prompts = make_prompts(batch, args.input, seed=1000 * batch + repeat)
        firsts.append(timed(server, prompts, 1))
        wholes.append(timed(server, prompts, args.output))
    first, whole = (statistics.median(seconds[args.warmup :]) for seconds in (firsts, wholes))
    counted = wholes[args.warmup :]
    return {
        "ttft_s": first,
        "output_tokens_per_s": batch * args.output / whole,
        "decode_tokens_per_s": batch * (args.output - 1) / (whole - first) if whole > first else None,
        "spread": max(counted) / min(counted) - 1,
    }


def speed(run: Run) -> None:
    args, table = run.args, {}

    def work(backend: str, server: Server, batches: Sequence[int] = args.batches) -> None:
        for batch in batches:
            point = measure(server, batch, args)
            table[batch, backend] = point
            run.write(what="serving", backend=backend, batch=batch, input=args.input, output=args.output, **point)

    if args.together:
        with run.all_servers() as servers:
            for batch in args.batches:
                for backend, server in servers.items():
                    with run.reported(backend):
                        work(backend, server, [batch])
    else:
        run.each_server(work)
    for what in ("output_tokens_per_s", "decode_tokens_per_s", "ttft_s"):
        print(f"\n{what}\nbatch " + "".join(f"{backend:>14}" for backend in args.backends))
        for batch in args.batches:
            values = (table.get((batch, backend), {}).get(what) for backend in args.backends)
            print(f"{batch:5} " + "".join(f"{'-' if value is None else format(value, '.4g'):>14}" for value in values))


# ---- check -----------------------------------------------------------------------------------------------------------


def compare(ours: list[Answer], theirs: list[Answer], tie: float) -> dict[str, object]:
    """Answers are compared up to their first difference."""
    identical, agreed, flips = 0, 0, []
    for a, b in zip(ours, theirs, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(b.tokens))
        identical += same == len(b.tokens)
        agreed += same
        flips += [b.margins[same]] if same < len(b.tokens) else []
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.tokens[0] == b.tokens[0]]
    first = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in pairs]
    return {
        "answers": len(theirs),
        "identical": identical,
        "tokens_before_first_difference": agreed / sum(len(b.tokens) for b in theirs),
        "differences_beyond_a_near_tie": sum(margin >= tie for margin in flips),
        "largest_margin_overturned": max(flips, default=0.0),
        "first_logprob_median_difference": statistics.median(first) if first else None,
        "first_logprob_largest_difference": max(first, default=None),
    }


def mixed(server: Server) -> dict[str, object]:
    """Concurrent requests of one prompt each, inputs of 1 to 300 and outputs of 1 to 100 tokens."""
    prompts = make_prompts(MIXED_REQUESTS, (1, 300), seed=7)
    lengths = [random.Random(i).randint(1, 100) for i in range(MIXED_REQUESTS)]

    def ask(i: int) -> str:
        try:
            [result] = server.generate([prompts[i]], lengths[i])
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return "" if len(result["output_ids"]) == lengths[i] else "wrong length"

    with ThreadPoolExecutor(MIXED_AT_ONCE) as pool:
        errors = [error for error in pool.map(ask, range(MIXED_REQUESTS)) if error]
    return {"requests": MIXED_REQUESTS, "errors": len(errors), "first_error": errors[0] if errors else None}


def crowd(server: Server, new_tokens: int) -> dict[str, object]:
    """Some prompts alone and, the same ones, each among 63 others."""
    prompts = make_prompts(4, 32, seed=8)
    alone = [server.generate([prompt], new_tokens)[0]["output_ids"] for prompt in prompts]
    again = [server.generate([prompt], new_tokens)[0]["output_ids"] for prompt in prompts]
    among = []
    for i, prompt in enumerate(prompts):
        others = make_prompts(CROWD - 1, (1, 64), seed=100 + i)
        among.append(server.generate([*others[: 20 * i], prompt, *others[20 * i :]], new_tokens)[20 * i]["output_ids"])
    same = sum(a == b for a, b in zip(alone, among, strict=True))
    return {"prompts": len(prompts), "same_again": sum(map(list.__eq__, alone, again)), f"same_among_{CROWD}": same}


def check(run: Run) -> None:
    args, reference = run.args, None
    prompts = make_prompts(args.prompts, (1, 48), seed=9)

    def work(backend: str, server: Server) -> None:
        nonlocal reference
        answers = server.complete(prompts, args.output)
        if reference is None:
            reference = answers
        else:
            result = compare(answers, reference, args.tie)
            run.failed |= result["differences_beyond_a_near_tie"] > len(prompts) / 8
            run.write(what="tokens", backend=backend, reference=args.backends[0], **result)
        result = mixed(server)
        run.failed |= result["errors"] > 0
        run.write(what="mixed", backend=backend, **result)
        run.write(what="crowd", backend=backend, **crowd(server, args.output))
        statuses = [server.status("/generate", body) for body in GARBAGE]
        alive = server.complete(prompts[:1], 1)[0].tokens == answers[0].tokens[:1]
        run.failed |= not alive or any(not 400 <= status < 500 for status in statuses)
        run.write(what="garbage", backend=backend, statuses=statuses, answers_as_before=alive)
        run.write(what="killed scheduler", backend=backend, exit_status=server.kill_scheduler())

    run.each_server(work)


# ---- command line ----------------------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    found = [name for name in text.split(",") if name]
    if not found:
        raise argparse.ArgumentTypeError(f"expected names, separated by commas, got {text!r}")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["speed", "check"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--backends", type=names, required=True, help="in this order; check compares with the first")
    parser.add_argument("--json", type=Path, help="append the results to this file")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in names(text)], default=[1, 4, 16, 64, 128, 256])
    parser.add_argument("--input", type=int, default=256, help="tokens of a prompt (speed)")
    parser.add_argument("--output", type=int, help="tokens of an answer (default: speed 64, check 16)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="repeats that are not counted")
    parser.add_argument("--together", action="store_true", help="all servers at once (speed)")
    parser.add_argument("--prompts", type=int, default=24, help="compared prompts (check)")
    parser.add_argument("--tie", type=float, default=TIE, help="margin below which a difference is a near tie (check)")
    parser.add_argument("--running", type=int, default=256, help="--max-running-requests and the largest decode graph")
    parser.add_argument("--memory", type=float, default=0.8, help="--mem-fraction-static")
    parser.add_argument("--flags", type=shlex.split, default=[], help='further server flags: --flags="--tp 2"')
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--path", type=names, default=[], help="folders to put before PYTHONPATH, separated by commas")
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder for the servers' logs")
    parser.add_argument("--start", type=float, default=240, help="seconds that a server may take to come up")
    parser.add_argument("--life", type=float, default=900, help="seconds after which a server is killed")
    parser.add_argument("--patience", type=float, default=120, help="seconds that one answer may take")
    args = parser.parse_args(argv)
    if not (args.model / "config.json").is_file():
        parser.error(f"model: expected a directory with a config.json, got {args.model}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: expected a file in a directory that exists, got {args.json}")
    args.output = args.output or (64 if args.command == "speed" else 16)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1: a server did not start, or a check failed."""
    args = parse(argv)
    args.logs.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    run.header()
    speed(run) if args.command == "speed" else check(run)
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
