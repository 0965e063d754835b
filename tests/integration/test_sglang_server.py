"""An installed SGLang on a CPU: its real servers over HTTP, --moe-runner-backend torch_moe against its own experts.

Several minutes, so only on demand: pytest -m sglang_server. SGLANG_PYTHON names the Python of an environment that has
SGLang already; otherwise one is made, if pip can.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock
from sglang_environment import FLAGS, environment, make_environment, make_model
from sglang_server import GARBAGE, Answer, Server

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
# standard deviation of 1; the two best of 1024 differ by 0.27 in the mean. NVFP4 keeps 1 bit: four times as much.
BF16, FP8, NVFP4 = Tolerance(0.1, 0.75), Tolerance(0.3, 0.5), Tolerance(0.8, 0.2)


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    if given := os.environ.get("SGLANG_PYTHON"):
        return Path(given)
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "sglang"  # the workers' bases lie in one folder
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            make_environment(folder)
            (folder / "complete").touch()
    return folder / "bin/python"


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
        log = folder / f"{len(list(folder.iterdir()))}.log"
        with Server(python, model, log, [*FLAGS, *flags], environment()) as server:
            result = server.complete(PROMPTS, NEW_TOKENS)
        runs = "runs the experts" in server.log.read_text()
        assert runs == (flags[:2] == OURS), "which backend ran?"
        return result

    return ask


def of_family(*cases: tuple[object, ...]) -> list:
    """Cases that start with a family. One worker of pytest-xdist runs all of a family, and starts each server once."""
    return [pytest.param(*case, marks=pytest.mark.xdist_group(str(case[0]))) for case in cases]


def expect_same(actual: list[Answer], expected: list[Answer], tolerance: Tolerance) -> None:
    """Answers are compared up to their first difference."""
    agreed, rerouted = 0, []
    for ours, theirs in zip(actual, expected, strict=True):
        for got, token, margin in zip(ours.tokens, theirs.tokens, theirs.margins, strict=True):
            if got != token:
                rerouted += [(ours, theirs)] * (margin >= tolerance.tie)
                break
            agreed += 1
    assert len(rerouted) <= len(expected) / 8, rerouted
    assert agreed >= tolerance.agree * NEW_TOKENS * len(expected), (agreed, actual, expected)


@pytest.mark.parametrize("family", of_family(("qwen3moe",), ("glm4",)))
def test_bf16_tokens_are_those_of_sglangs_own_experts(family, model, answers) -> None:
    checkpoint = model(family, "bf16")
    expect_same(answers(checkpoint, *OURS), answers(checkpoint), BF16)


@pytest.mark.parametrize(
    "family, checkpoint, tolerance",
    of_family(
        ("qwen3moe", "fp8_block", FP8),
        ("glm4", "fp8_block", FP8),
        ("glm4", "nvfp4", NVFP4),
        ("qwen3moe", "ct_mxfp4", BF16),  # only the weights are MXFP4
    ),
)
def test_quantised_tokens_are_those_of_the_dequantised_weights(family, checkpoint, tolerance, model, answers) -> None:
    """On a CPU SGLang has no quantised experts of its own."""
    expected = answers(model(family, checkpoint, "--dequantised"))
    expect_same(answers(model(family, checkpoint), *OURS), expected, tolerance)


GPT_OSS = ("--attention-backend", "intel_amx", "--disable-cuda-graph")  # SGLang's native one, under a name it accepts


@pytest.mark.xdist_group("gptoss")
def test_gpt_oss_tokens_are_those_of_sglangs_own_experts(model, answers) -> None:
    """Biases, interleaved gate and up, and the clamped activation; with MXFP4, only the weights are rounded."""
    dequantised = model("gptoss", "mxfp4", "--dequantised")
    expected = answers(dequantised, *GPT_OSS)
    expect_same(answers(dequantised, *OURS, *GPT_OSS), expected, BF16)
    expect_same(answers(model("gptoss", "mxfp4"), *OURS, *GPT_OSS), expected, BF16)


@pytest.mark.xdist_group("qwen3moe")
@pytest.mark.parametrize("checkpoint, tolerance", [("ct_int8", BF16), ("fp8_tensor", FP8), ("modelopt_fp8", FP8)])
def test_eight_bits_are_close_to_the_original(checkpoint, tolerance, model, answers) -> None:
    """INT8 with a scale per token and channel keeps 7 bits, as bf16 does."""
    expected = answers(model("qwen3moe", "bf16"))
    expect_same(answers(model("qwen3moe", checkpoint), *OURS), expected, tolerance)


EP2 = ("--tp", "2", "--ep", "2")


@pytest.mark.xdist_group("glm4")
@pytest.mark.parametrize(
    "checkpoint, tolerance, ranks",
    [
        ("bf16", BF16, ("--tp", "2")),
        ("bf16", BF16, (*EP2, "--ep-num-redundant-experts", "2")),
        ("fp8_block", FP8, EP2),
        ("bf16", BF16, ("--tp", "2", "--dp", "2", "--enable-dp-attention")),  # batches padded to the longest rank's
    ],
)
def test_ranks_share_the_experts(checkpoint, tolerance, ranks, model, answers) -> None:
    one = answers(model("glm4", checkpoint), *OURS)
    expect_same(answers(model("glm4", checkpoint), *OURS, *ranks), one, tolerance)


COMPILE = ("--enable-torch-compile", "--torch-compile-max-bs", "1", "--max-running-requests", "1")


@pytest.mark.xdist_group("qwen3moe")
def test_compiled_models_hold_the_same_experts(python, model, answers, tmp_path) -> None:
    """SGLang compiles the model for decoding. Its graphs break in the attention, not in our part; Inductor rounds what
    it fuses around the experts less often."""
    checkpoint, log = model("qwen3moe", "bf16"), tmp_path / "log"
    env = environment(TORCH_LOGS="graph_breaks,graph_code")
    with Server(python, checkpoint, log, [*FLAGS, *OURS, *COMPILE], env, start=480) as server:
        compiled = server.complete(PROMPTS[::3], NEW_TOKENS)
    said = log.read_text()
    assert "torch.ops.moe.fused_moe.default(" in said, "the compiled model has no experts of ours"
    assert not re.search("Graph break in user code at .*torch_moe_ops", said)
    expect_same(compiled, answers(checkpoint, *OURS)[::3], BF16)


def test_garbage_and_a_killed_scheduler_end_as_with_sglangs_own_experts(python, model, tmp_path) -> None:
    def outcome(*flags: str) -> tuple[object, ...]:
        log = tmp_path / f"{len(flags)}.log"
        with Server(python, model("qwen3moe", "bf16"), log, [*FLAGS, *flags], environment()) as server:
            [before] = server.complete(PROMPTS[:1], NEW_TOKENS)
            statuses = [server.status("/generate", body) for body in GARBAGE]
            assert server.complete(PROMPTS[:1], NEW_TOKENS) == [before]
            return server.info()["moe_runner_backend"], statuses, server.kill_scheduler()

    theirs, ours = outcome(), outcome(*OURS)
    assert ours == ("torch_moe", *theirs[1:])
    assert all(400 <= status < 500 for status in ours[1])


# without a server ----------------------------------------------------------------------------------------------------


REGISTERED = """
from torch_moe_ops.integration.sglang import register
register()
from sglang.srt.plugins.hook_registry import HookRegistry
HookRegistry.apply_hooks()
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe import utils
from sglang.srt.layers.quantization import fp8, unquant
for function in (FusedMoE.__init__, unquant.UnquantizedFusedMoEMethod.create_moe_runner,
                 fp8.Fp8MoEMethod.create_moe_runner):
    assert hasattr(function, "__wrapped__"), function
resolve = getattr(utils, "resolve_moe_runner_backend", utils.MoeRunnerBackend)
assert resolve("torch_moe").value == "torch_moe" and not resolve("torch_moe").is_auto()
"""

# A layer with SGLang's own quantisation method, taken over by the adapter, and what torch.compile makes of it.
LAYER = """
import torch
from types import SimpleNamespace
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from torch_moe_ops import fused_moe
from torch_moe_ops.integration.sglang.layer import LayerRunner

layer, method = torch.nn.Module(), UnquantizedFusedMoEMethod(use_triton_kernels=False)
layer.w13_weight, layer.w2_weight = torch.randn(4, 128, 64).bfloat16(), torch.randn(4, 64, 64).bfloat16()
config = MoeRunnerConfig(num_experts=4, top_k=2, params_dtype=torch.bfloat16)
LayerRunner(method, layer, config, SimpleNamespace(value="torch_moe"), StandardCombineInput).take_over(method)

x, weights, ids = torch.randn(1, 64).bfloat16(), torch.rand(1, 2), torch.tensor([[3, 1]], dtype=torch.int32)
logits, nodes = torch.zeros(1, 4), []

def routed(x, topk_output):
    return method.apply(layer=layer, dispatch_output=StandardDispatchOutput(x, None, topk_output)).hidden_states

def backend(graph, inputs):
    nodes.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
    return graph

def check(forward, op):
    with torch.no_grad():
        output = torch.compile(forward, fullgraph=True, backend=backend)(x, weights, ids)
    assert torch.equal(output, fused_moe(x, layer.w13_weight, layer.w2_weight, weights, ids))
    assert op in nodes, nodes
"""

# On a GPU SGLang replaces its bf16 experts by plain torch where it compiles a model for one token.
SWITCHED = f"""{LAYER}
from sglang.srt.layers.moe.fused_moe_native import fused_moe_forward_native
method.enter_torch_compile(num_tokens=1)
assert method._forward_method is fused_moe_forward_native
check(lambda x, weights, ids: routed(x, StandardTopKOutput(weights, ids, logits)), torch.ops.moe.fused_moe.default)
"""

# In piecewise prefill graphs SGLang calls the whole layer as one op of its own, which it registers for GPUs alone.
PIECEWISE = f"""
from torch import library as registry
Library = registry.Library
implement = Library.impl
def on_cpus_too(library, name, function, key="", **options):
    for key in {{key, "CPU"}} if library.ns == "sglang" and key == "CUDA" else {{key}}:
        implement(library, name, function, key, **options)
Library.impl = on_cpus_too
{LAYER}
from sglang.srt.layers.moe.fused_moe_triton.layer import moe_forward_piecewise_cuda_graph_impl as whole_layer
from sglang.srt.model_executor.runner_backend_utils import tc_piecewise_cuda_graph as piecewise
with piecewise.set_tc_piecewise_forward_context(None, [], None, [SimpleNamespace(forward_impl=routed)], []):
    check(lambda x, weights, ids: whole_layer(x, weights, ids, logits, 0),
          torch.ops.sglang.moe_forward_piecewise_cuda_graph_impl)
assert torch.ops.moe.fused_moe.default not in nodes
"""


# A draft model with --speculative-moe-runner-backend is built with that backend as the chosen one.
DRAFTED = """
from sglang.srt.layers.moe import utils
from sglang.srt.runtime_context import get_flags
from torch_moe_ops.integration.sglang import hooks, register
register()
moe, resolve = get_flags().moe, getattr(utils, "resolve_moe_runner_backend", utils.MoeRunnerBackend)
for model, draft in (("torch_moe", "triton"), ("triton", "torch_moe")):
    moe.runner_backend, moe.speculative_runner_backend = resolve(model), resolve(draft)
    assert hooks.is_chosen() == (model == "torch_moe")
    with utils.speculative_moe_backend_context():
        assert hooks.is_chosen() == (draft == "torch_moe")
"""


@pytest.mark.parametrize(
    "script",
    [REGISTERED, SWITCHED, PIECEWISE, DRAFTED],
    ids=["hooks", "torch.compile", "piecewise graphs", "draft model"],
)
def test_the_adapter_in_its_place(script, python) -> None:
    subprocess.run([python, "-c", script], check=True, timeout=240, env=environment())


# refusals -------------------------------------------------------------------------------------------------------------


def test_the_flag_is_known_with_the_plugin_alone(python) -> None:
    command = [python, "-m", "sglang.launch_server", "--help"]
    options = {"capture_output": True, "text": True, "timeout": 240}
    shown = subprocess.run(command, **options, env=environment(COLUMNS="1000"))
    assert re.search(r"--moe-runner-backend \{.*torch_moe.*\}", shown.stdout)
    command = [*command[:-1], "--model-path", "absent", *OURS]
    unknown = subprocess.run(command, **options, env=environment(SGLANG_PLUGINS="none"))
    assert "argument --moe-runner-backend: invalid choice: 'torch_moe'" in unknown.stderr


def refusal(python: Path, model: Path, log: Path, *flags: str) -> str:
    return Server(python, model, log, [*FLAGS, *OURS, *flags], environment()).refusal()


@pytest.mark.parametrize(
    "flags, got",
    [
        (["--moe-a2a-backend", "deepep"], "--moe-a2a-backend deepep"),
        (["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "qkv_proj"], "LoRA adapters"),
    ],
)
def test_unsupported_settings_end_the_start_with_one_sentence(flags, got, python, model, tmp_path) -> None:
    log = refusal(python, model("qwen3moe", "bf16"), tmp_path / "log", *flags)
    assert f"--moe-runner-backend torch_moe: expected {support.supported('cpu')}, got {got}\n" in log


def test_an_unsupported_model_ends_the_start_with_one_sentence(python, model, tmp_path) -> None:
    log = refusal(python, model("qwen3moe", "ct_fp8_channel"), tmp_path / "log")
    got = "FP8 experts with a scale per channel"
    assert f"--moe-runner-backend torch_moe: expected {support.supported('cpu')}, got {got}\n" in log
