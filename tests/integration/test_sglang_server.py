"""Real SGLang servers over HTTP, on a CPU: --moe-runner-backend torch_moe against SGLang's own experts.

Several minutes, so only on demand: pytest -m sglang_server. SGLANG_PYTHON names the Python of an environment that has
SGLang already; otherwise one is made, if pip can.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from sglang_server import START_SECONDS, Answer, Server, environment, make_environment, make_model

from torch_moe_ops.integration.sglang import support

pytestmark = pytest.mark.sglang_server

OURS = ("--moe-runner-backend", "torch_moe")
PROMPTS = [[(7 * i + 11 * j) % 1000 for j in range(1 + i)] for i in range(24)]
NEW_TOKENS = 4


class Tolerance(NamedTuple):
    """Another arithmetic may choose the other token at a near tie, and then continues from that token. At a near tie
    of the router it may choose another expert, and any other token: one answer in eight may differ so."""

    tie: float  # the largest difference of two log-probabilities that may change its sign
    agree: float  # the share of tokens that must be the same


# The logits, of size 4, are bf16 (spacing 2^-6), and so is everything between the layers. FP8 keeps 3 bits of the
# experts' inputs, which the dequantised reference does not round: 3 % of their outputs, that is of most of a logit's
# standard deviation of 1; the two best of 1024 differ by 0.27 in the mean.
BF16, FP8 = Tolerance(0.1, 0.75), Tolerance(0.3, 0.5)
TOLERANCES = {"bf16": BF16, "fp8_block": FP8}


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("SGLANG_PYTHON")
    return Path(given) if given else make_environment(tmp_path_factory.mktemp("sglang") / "environment")


@pytest.fixture(scope="session")
def model(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """model(family, checkpoint, *options) -> a checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda *args: make_model(python, folder / "-".join(args).replace("--", ""), *args))


@pytest.fixture(scope="session")
def answers(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Answer]]:
    """answers(model, *flags): what a server says to PROMPTS; each server runs once."""
    folder = tmp_path_factory.mktemp("logs")

    @cache
    def ask(model: Path, *flags: str) -> list[Answer]:
        with Server(python, model, folder / f"{len(list(folder.iterdir()))}.log", *flags) as server:
            result = server.complete(PROMPTS, NEW_TOKENS)
        runs = "runs the experts" in server.log.read_text()
        assert runs == (flags[:2] == OURS), "which backend ran?"
        return result

    return ask


def expect_same(actual: list[Answer], expected: list[Answer], tolerance: Tolerance) -> None:
    """Answers are compared up to their first difference."""
    agreed, rerouted = 0, []
    for ours, theirs in zip(actual, expected, strict=True):
        for got, token, margin in zip(ours.tokens, theirs.tokens, theirs.margins, strict=True):
            if got != token:
                rerouted += [(ours, theirs)] * (margin >= tolerance.tie)
                break
            agreed += 1
    assert len(rerouted) <= len(PROMPTS) / 8, rerouted
    assert agreed >= tolerance.agree * NEW_TOKENS * len(PROMPTS), (agreed, actual, expected)


@pytest.mark.parametrize("family", ["qwen3moe", "glm4"])
def test_bf16_tokens_are_those_of_sglangs_own_experts(family, model, answers) -> None:
    checkpoint = model(family, "bf16")
    expect_same(answers(checkpoint, *OURS), answers(checkpoint), BF16)


@pytest.mark.parametrize("family", ["qwen3moe", "glm4"])
def test_fp8_tokens_are_those_of_the_dequantised_weights(family, model, answers) -> None:
    """On a CPU SGLang has no FP8 experts of its own."""
    expected = answers(model(family, "fp8_block", "--dequantised"))
    expect_same(answers(model(family, "fp8_block"), *OURS), expected, FP8)


@pytest.mark.parametrize("checkpoint", ["bf16", "fp8_block"])
@pytest.mark.parametrize("ranks", [("--tp", "2"), ("--tp", "2", "--ep", "2")], ids=" ".join)
def test_ranks_share_the_experts(checkpoint, ranks, model, answers) -> None:
    one = answers(model("glm4", checkpoint), *OURS)
    expect_same(answers(model("glm4", checkpoint), *OURS, *ranks), one, TOLERANCES[checkpoint])


GARBAGE = (b"{", b"[]", b'{"input_ids": "x"}', b'{"input_ids": [1], "sampling_params": {"top_p": 9}}')


def test_garbage_and_a_killed_scheduler_end_as_with_sglangs_own_experts(python, model, tmp_path) -> None:
    def outcome(*flags: str) -> tuple[object, ...]:
        with Server(python, model("qwen3moe", "bf16"), tmp_path / f"{len(flags)}.log", *flags) as server:
            [before] = server.complete(PROMPTS[:1], NEW_TOKENS)
            statuses = [server.status("/generate", body) for body in GARBAGE]
            assert server.complete(PROMPTS[:1], NEW_TOKENS) == [before]
            info = json.loads(server.get("/get_server_info"))
            return info["moe_runner_backend"], statuses, server.kill_scheduler()

    theirs, ours = outcome(), outcome(*OURS)
    assert ours == ("torch_moe", *theirs[1:])
    assert all(400 <= status < 500 for status in ours[1])


# refusals -------------------------------------------------------------------------------------------------------------


def test_the_flag_is_known_with_the_plugin_alone(python) -> None:
    command = [python, "-m", "sglang.launch_server", "--help"]
    options = {"capture_output": True, "text": True, "timeout": START_SECONDS}
    shown = subprocess.run(command, **options, env=environment(COLUMNS="1000"))
    assert re.search(r"--moe-runner-backend \{.*torch_moe.*\}", shown.stdout)
    command = [*command[:-1], "--model-path", "absent", *OURS]
    unknown = subprocess.run(command, **options, env=environment(SGLANG_PLUGINS="none"))
    assert "argument --moe-runner-backend: invalid choice: 'torch_moe'" in unknown.stderr


@pytest.mark.parametrize(
    "flags, got",
    [
        (["--moe-a2a-backend", "deepep"], "--moe-a2a-backend deepep"),
        (["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "qkv_proj"], "LoRA adapters"),
    ],
)
def test_unsupported_settings_end_the_start_with_one_sentence(flags, got, python, model, tmp_path) -> None:
    log = Server(python, model("qwen3moe", "bf16"), tmp_path / "log", *OURS, *flags).refusal()
    assert f"--moe-runner-backend torch_moe: expected {support.supported('cpu')}, got {got}\n" in log
