"""The choice of a backend is a pure function of static facts, and it explains itself."""

from __future__ import annotations

import gc
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from moe_cases import make_moe
from torch import library

import torch_moe_ops as moe
from torch_moe_ops import _library, backends
from torch_moe_ops.backends import CANDIDATES, GEMM_FORMATS, GEMM_OPS, Gemm, Problem, explain_problem, select
from torch_moe_ops.formats import FORMATS
from torch_moe_ops.meta_kernels import topk
from torch_moe_ops.meta_kernels.grouped_gemm import check_formats

EVERYTHING = frozenset({"reference", "triton", "cuda", *GEMM_FORMATS})
DEEPSEEK = (Gemm(4096, 7168, 2), Gemm(7168, 2048))


def problem(op: str = "fused_moe", sm: int = 90, built: frozenset[str] = EVERYTHING, **facts: object) -> Problem:
    facts = {"gemms": DEEPSEEK, "num_experts": 256, "top_k": 8} | facts if op == "fused_moe" else facts
    return Problem(op, "cuda" if sm else "cpu", sm, built, **facts)


def test_explanations() -> None:
    questions = [
        problem(format="fp8_block"),
        problem(format="fp8_block", sm=80),
        problem(format="fp8_block", act_format="bf16"),
        problem(format="int8"),
        problem("grouped_gemm", sm=103, format="fp8_block", gemms=(Gemm(4096, 7168, 2),), out_dtype=torch.bfloat16),
        problem("grouped_gemm", sm=86, gemms=(Gemm(4096, 7170),)),
        problem("grouped_gemm", sm=120, format="int8"),
        problem("grouped_gemm", format="int8"),
        problem(format="fp8_block", gemms=(Gemm(400, 7168, 2), Gemm(7168, 200))),
        problem(num_experts=2000),
        problem("topk"),
        problem("topk", sm=0),
        problem("topk", built=frozenset({"reference"})),
    ]
    assert_expected_inline(
        "\n\n".join(str(explain_problem(p)) for p in questions),
        """\
fused_moe on cuda (sm90), fp8_block, n 4096 k 7168, n 7168 k 2048
  cutlass_sm90  yes
  cutlass_sm100 no: needs sm100 or sm103, got sm90
  cutlass_sm120 no: needs sm120 or sm121, got sm90
  triton        yes, after cutlass_sm90
  reference     no: plain torch; on a GPU it runs only when called by name

fused_moe on cuda (sm80), fp8_block, n 4096 k 7168, n 7168 k 2048
  cutlass_sm90  no: needs sm90, got sm80
  cutlass_sm100 no: needs sm100 or sm103, got sm80
  cutlass_sm120 no: needs sm120 or sm121, got sm80
  triton        yes
  reference     no: plain torch; on a GPU it runs only when called by name

fused_moe on cuda (sm90), fp8_block weights, bf16 activations, n 4096 k 7168, n 7168 k 2048
  cutlass_sm90  no: multiplies fp8_block weights by fp8_block activations, got bf16
  cutlass_sm100 no: needs sm100 or sm103, got sm90
  cutlass_sm120 no: needs sm120 or sm121, got sm90
  triton        yes
  reference     no: plain torch; on a GPU it runs only when called by name

fused_moe on cuda (sm90), int8, n 4096 k 7168, n 7168 k 2048
  cutlass_sm90  no: multiplies bf16, fp16, fp8_block, nvfp4, mxfp4, mxfp8, got int8
  cutlass_sm100 no: needs sm100 or sm103, got sm90
  cutlass_sm120 no: needs sm120 or sm121, got sm90
  triton        yes
  reference     no: plain torch; on a GPU it runs only when called by name

grouped_gemm on cuda (sm103), fp8_block, n 4096 k 7168
  cutlass_sm90  no: needs sm90, got sm103
  cutlass_sm100 yes (compiled, inspected, not executed)
  cutlass_sm120 no: needs sm120 or sm121, got sm103
  cutlass_sm80  no: multiplies bf16, fp16, int8, got fp8_block
  triton        yes, after cutlass_sm100
  reference     no: plain torch; on a GPU it runs only when called by name

grouped_gemm on cuda (sm86), bf16, n 4096 k 7170
  cutlass_sm90  no: needs sm90, got sm86
  cutlass_sm100 no: needs sm100 or sm103, got sm86
  cutlass_sm120 no: needs sm120 or sm121, got sm86
  cutlass_sm80  no: needs K to be a multiple of 8, got 7170
  triton        yes
  reference     no: plain torch; on a GPU it runs only when called by name

grouped_gemm on cuda (sm120), int8
  cutlass_sm90  no: needs sm90, got sm120
  cutlass_sm100 no: needs sm100 or sm103, got sm120
  cutlass_sm120 no: multiplies fp8_block, mxfp8, mxfp4, nvfp4, got int8
  cutlass_sm80  yes
  triton        yes, after cutlass_sm80
  reference     no: plain torch; on a GPU it runs only when called by name

grouped_gemm on cuda (sm90), int8
  cutlass_sm90  no: multiplies bf16, fp16, fp8_block, nvfp4, mxfp4, mxfp8, got int8
  cutlass_sm100 no: needs sm100 or sm103, got sm90
  cutlass_sm120 no: needs sm120 or sm121, got sm90
  cutlass_sm80  no: on sm90 it runs only when called by name
  triton        yes
  reference     no: plain torch; on a GPU it runs only when called by name

fused_moe on cuda (sm90), fp8_block, n 400 k 7168, n 7168 k 200
  cutlass_sm90  no: needs intermediate_size to be a multiple of 16, got 200
  cutlass_sm100 no: needs sm100 or sm103, got sm90
  cutlass_sm120 no: needs sm120 or sm121, got sm90
  triton        yes
  reference     no: plain torch; on a GPU it runs only when called by name

fused_moe on cuda (sm90), bf16, n 4096 k 7168, n 7168 k 2048
  cutlass_sm90  no: takes at most 1024 experts, got 2000
  cutlass_sm100 no: needs sm100 or sm103, got sm90
  cutlass_sm120 no: needs sm120 or sm121, got sm90
  triton        yes
  reference     no: plain torch; on a GPU it runs only when called by name

topk on cuda (sm90), bf16
  cuda          yes
  triton        yes, after cuda
  reference     no: plain torch; on a GPU it runs only when called by name

topk on cpu, bf16
  cuda          no: needs a CUDA device, got cpu
  triton        no: Triton's interpreter is for tests; on a CPU it runs only when called by name
  reference     yes

topk on cuda (sm90), bf16
  cuda          no: this build has no such CUDA kernel
  triton        no: the triton package is not installed
  reference     no: plain torch; on a GPU it runs only when called by name""",
    )


@pytest.mark.parametrize(
    ("sm", "format", "backend"),
    [
        (0, "nvfp4", "reference"),
        (80, "bf16", "cutlass_sm80"),
        (89, "int8", "cutlass_sm80"),
        (89, "fp8_block", "triton"),
        (90, "bf16", "cutlass_sm90"),
        (90, "fp16", "cutlass_sm90"),
        (90, "fp8_block", "cutlass_sm90"),
        (90, "int8", "triton"),
        (86, "nvfp4", "triton"),
        (90, "mxfp8", "triton"),
        (120, "fp8_block_e8m0", "triton"),
        (100, "fp8_block", "cutlass_sm100"),
        (100, "nvfp4", "cutlass_sm100"),
        (100, "mxfp4", "cutlass_sm100"),
        (103, "mxfp8", "cutlass_sm100"),
        (103, "bf16", "cutlass_sm100"),
        (100, "fp16", "cutlass_sm80"),
        (103, "int8", "cutlass_sm80"),
        (120, "fp8_block", "cutlass_sm120"),
        (120, "nvfp4", "cutlass_sm120"),
        (120, "mxfp8", "cutlass_sm120"),
        (121, "mxfp4", "cutlass_sm120"),
        (121, "bf16", "cutlass_sm80"),
    ],
)
def test_grouped_gemm_per_gpu(sm: int, format: str, backend: str) -> None:
    assert select(problem("grouped_gemm", sm, format=format, gemms=(Gemm(256, 512),))) == backend


@pytest.mark.parametrize(
    ("sm", "facts", "reason"),
    [
        (90, {"gemms": (Gemm(256, 100),)}, "needs K to be a multiple of 8, got 100"),
        (90, {"gemms": (Gemm(256, 100),), "format": "fp8_block"}, "needs K to be a multiple of 16, got 100"),
        (90, {"gemms": (Gemm(24, 64, 2),)}, "needs N of each part to be a multiple of 8, got 12"),
        (80, {"gemms": (Gemm(20, 64, 2),)}, "needs N to be a multiple of 8, got 20"),
        (80, {"gemms": (Gemm(24, 64, 2),)}, None),
        (90, {"num_experts": 1025}, "takes at most 1024 experts, got 1025"),
        (90, {"format": "nvfp4"}, "multiplies nvfp4 weights by bf16 activations, got nvfp4"),
        (90, {"format": "nvfp4", "act_format": "bf16"}, "needs weights packed by pack_weight"),
        (90, {"format": "nvfp4", "act_format": "bf16", "packed": True}, None),
        (
            90,
            {"format": "mxfp4", "act_format": "fp16", "packed": True},
            "multiplies mxfp4 weights by bf16 or fp8_block activations, got fp16",
        ),
        (90, {"format": "mxfp4", "act_format": "fp8_block", "packed": True}, None),
        (
            90,
            {"format": "mxfp4", "act_format": "fp8_block"},
            'needs weights packed by pack_weight(..., act_format="fp8_block")',
        ),
        (
            90,
            {"format": "mxfp4", "act_format": "fp8_block", "packed": True, "gemms": (Gemm(256, 96),)},
            "needs K to be a multiple of 64 for packed weights, got 96",
        ),
        (
            90,
            {"format": "nvfp4", "act_format": "fp8_block", "packed": True},
            "multiplies nvfp4 weights by bf16 activations, got fp8_block",
        ),
        (100, {"gemms": (Gemm(256, 256),), "format": "mxfp4", "act_format": "mxfp8"}, None),
        (
            120,
            {"gemms": (Gemm(256, 192),), "format": "mxfp4", "act_format": "mxfp8"},
            "needs K to be a multiple of 128, got 192",
        ),
        (100, {"format": "nvfp4", "packed": True}, "needs weights as they are stored, got packed ones"),
        (100, {"gemms": (Gemm(256, 80),), "format": "nvfp4"}, "needs K to be a multiple of 32, got 80"),
        (100, {"gemms": (Gemm(256, 80, 2),), "format": "mxfp8"}, None),
        (
            100,
            {"gemms": (Gemm(256, 80),), "format": "mxfp8", "act_format": "bf16"},
            "multiplies mxfp8 weights by mxfp8 activations, got bf16",
        ),
        (100, {"out_dtype": torch.float16}, "needs a bfloat16 or float32 output, got float16"),
        (100, {"bias_dtype": torch.float16}, "needs a bfloat16 bias, got float16"),
        (
            120,
            {"gemms": (Gemm(96, 64, 2),), "format": "fp8_block"},
            "needs N of each part to be a multiple of 128, got 48",
        ),
    ],
)
def test_reasons(sm: int, facts: dict[str, object], reason: str | None) -> None:
    verdicts = {v.backend: v.reason for v in explain_problem(problem("grouped_gemm", sm, **facts)).verdicts}
    assert verdicts[f"cutlass_sm{sm}"] == reason


def test_limits_of_the_stage_kernels() -> None:
    limits = {
        "takes at most 1024 experts, got 1025": problem("topk", num_experts=1025),
        "takes at most 32 experts a token, got 33": problem("topk", top_k=33),
        "takes at most 32 groups, got 64": problem("topk", num_groups=64),
        "takes at most 1024 experts, got 2048": problem("sort_slots", num_experts=2048),
    }
    for reason, p in limits.items():
        assert explain_problem(p).verdicts[0].reason == reason and select(p) == "triton"


def test_a_gpu_never_runs_the_reference() -> None:
    for op in CANDIDATES:
        for sm in (70, 75, 80, 86, 90, 100, 120):
            for built in (EVERYTHING, frozenset({"reference"})):
                assert explain_problem(problem(op, sm, built)).backend != "reference"
        assert select(problem(op, sm=0)) == "reference"


def test_no_backend_is_one_line_with_every_reason() -> None:
    with pytest.raises(RuntimeError) as caught:
        select(problem(built=frozenset({"reference"}), format="fp8_block"))
    assert_expected_inline(
        str(caught.value),
        """fused_moe: backend: expected one that can run this problem, got none (cutlass_sm90: this build has no such CUDA kernel; cutlass_sm100: needs sm100 or sm103, got sm90; cutlass_sm120: needs sm120 or sm121, got sm90; triton: the triton package is not installed; reference: plain torch; on a GPU it runs only when called by name)""",  # noqa: E501
    )


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 103, 120, 121])
def test_gpus_multiply_what_the_ops_accept(sm: int) -> None:
    for op, format, act_format in product(GEMM_OPS, FORMATS, FORMATS):
        try:
            check_formats(op, format, act_format)
        except RuntimeError:
            continue
        assert select(problem(op, sm, format=format, act_format=act_format)) != "reference"


@pytest.mark.parametrize(
    ("op", "sm", "format", "act_formats", "choice"),
    [
        ("fused_moe", 80, "nvfp4", ("", "bf16"), ("triton", "", False)),
        ("fused_moe", 80, "mxfp4", ("bf16", "mxfp8"), ("triton", "bf16", False)),
        ("fused_moe", 90, "nvfp4", ("", "bf16"), ("cutlass_sm90", "bf16", True)),
        ("fused_moe", 90, "nvfp4", ("bf16",), ("cutlass_sm90", "bf16", True)),
        ("fused_moe", 90, "nvfp4", ("",), ("cutlass_sm90", "", True)),
        ("fused_moe", 90, "nvfp4", ("fp8_block_e8m0",), ("cutlass_sm90", "fp8_block_e8m0", True)),
        ("fused_moe", 90, "mxfp4", ("mxfp8", "bf16"), ("cutlass_sm90", "bf16", True)),
        ("grouped_gemm", 90, "nvfp4", ("",), ("triton", "", False)),
        ("fused_moe", 90, "mxfp4", ("", "bf16"), ("cutlass_sm90", "bf16", True)),
        ("fused_moe", 90, "mxfp4", ("fp8_block",), ("cutlass_sm90", "fp8_block", True)),
        ("fused_moe", 90, "nvfp4", ("fp8_block",), ("cutlass_sm90", "fp8_block", True)),
        ("fused_moe", 120, "mxfp4", ("fp8_block",), ("triton", "fp8_block", False)),
        ("fused_moe", 90, "mxfp8", ("", "bf16"), ("cutlass_sm90", "bf16", True)),
        ("fused_moe", 90, "fp8_block", ("",), ("cutlass_sm90", "", False)),
        ("grouped_gemm", 100, "nvfp4", ("", "bf16"), ("cutlass_sm100", "", False)),
        ("grouped_gemm", 100, "mxfp4", ("bf16", "mxfp8"), ("cutlass_sm100", "mxfp8", False)),
        ("grouped_gemm", 120, "mxfp8", ("", "bf16"), ("cutlass_sm120", "", False)),
        ("fused_moe", 0, "nvfp4", ("", "bf16"), ("reference", "", False)),
        ("fused_moe", 70, "nvfp4", ("", "bf16"), (None, "bf16", True)),
    ],
)
def test_kernels_for_the_gpu_are_chosen_before_portable_ones(
    monkeypatch: pytest.MonkeyPatch, op: str, sm: int, format: str, act_formats: tuple[str, ...], choice: tuple
) -> None:
    monkeypatch.setattr(backends, "built_backends", lambda op, device_type: EVERYTHING)
    device = "cuda" if sm else "cpu"
    last = backends.explain_choices(format, act_formats, op=op, device=device, sm=sm)[-1]
    assert (last.backend, last.problem.act_format, last.problem.packed) == choice


def test_a_backend_of_a_gemm_called_by_name_refuses_formats() -> None:
    backends.expect_formats("fused_moe", "triton", "nvfp4", "fp16", False)
    with pytest.raises(RuntimeError) as caught:
        backends.expect_formats("fused_moe", "triton", "mxfp8", "fp8_block", False)
    assert_expected_inline(
        str(caught.value),
        """fused_moe: backend: expected one that can run this problem, got triton (multiplies mxfp8 weights by mxfp8 or bf16 or fp16 activations, got fp8_block)""",  # noqa: E501
    )


def test_explain() -> None:
    answer = moe.explain("fused_moe", device="cpu", format="mxfp4", hidden_size=64, intermediate_size=32)
    assert answer.backend == "reference" and answer.problem.gemms == (Gemm(64, 64, 2), Gemm(64, 32))
    answer = moe.explain(device="cpu", activation="relu2_no_mul", hidden_size=64, intermediate_size=32)
    assert answer.problem.gemms == (Gemm(32, 64), Gemm(64, 32))
    assert moe.explain("grouped_gemm", sm=80, n=64, k=32, b_parts=2).problem.gemms == (Gemm(64, 32, 2),)
    with pytest.raises(RuntimeError, match="^explain: op: expected one of topk, .*, got moe$"):
        moe.explain("moe")


def test_explain_names_what_default_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    from torch_moe_ops import _library

    monkeypatch.setattr(_library, "select", lambda p: called.append(p) or select(p))
    for _ in range(2):  # the second call remembers the first
        moe.topk(torch.randn(3, 1019), 2)
    assert called == [moe.explain("topk", device="cpu", num_experts=1019, top_k=2).problem]


def cxx_default() -> Callable:
    """fused_moe's kernel for CUDA, which is C++: on a CPU it finds no GPU of its own and asks Python."""
    if not hasattr(torch.ops.moe, "choose_fused_moe"):
        pytest.skip("needs a library with kernels for SM90")
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return partial(torch.ops.moe.fused_moe.default.redispatch, cuda)


def test_the_librarys_default_asks_python() -> None:
    call, default = make_moe("fp8_block", num_tokens=3, bias=True), cxx_default()
    assert torch.equal(call(default), call(torch.ops.moe.fused_moe.default))
    for wrong in (
        call.but(call.args[0][:, 1:]),
        call.but(format="fp4"),
        call.but(call.args[0].clone().requires_grad_()),
    ):
        with pytest.raises(RuntimeError) as caught:
            wrong(torch.ops.moe.fused_moe.default)
        with pytest.raises(RuntimeError, match=f"^{re.escape(str(caught.value))}$"):
            wrong(default)


def test_the_librarys_default_keeps_no_memory() -> None:
    """torch's own conversions of strings lose some for each."""
    call, default = make_moe("bf16", num_tokens=1, hidden_size=8, intermediate_size=8), cxx_default()

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def growth(calls: int) -> int:
        before = resident()
        for _ in range(calls):
            call(default)
        return resident() - before

    growth(200)
    assert min(growth(1000) for _ in range(3)) < 1000 * 100  # others allocate, too, but not each time


def test_exceptions_on_their_way_through_the_shared_library_are_text() -> None:
    assert _library._answer(lambda: {}["where"]) is None
    text = _library._why_not()
    assert "in <lambda>" in text and text.endswith("KeyError: 'where'\n")
    assert not _library._WHY_NOT


INTERRUPTED = """
import signal, torch, test_backends
from torch_moe_ops import _library

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored

def interrupted(problem):
    raise KeyboardInterrupt

default, _library.select = test_backends.cxx_default(), interrupted
try:
    try:
        test_backends.make_moe("bf16", num_tokens=2)(default)
    except RuntimeError:
        for _ in range(10**8):  # Python looks for signals
            pass
except KeyboardInterrupt:
    print("as it should be")
"""


def test_interrupts_come_through_the_shared_library() -> None:
    """In a process of its own, whose signals are nobody else's."""
    cxx_default()  # skips
    command = [sys.executable, "-c", INTERRUPTED]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout == "as it should be\n", done.stderr


def test_any_requires_grad() -> None:
    tensors = [torch.zeros(2), torch.zeros(2, requires_grad=True)]
    assert _library._any_requires_grad(tensors) and not _library._any_requires_grad(tensors[:1])


def test_explain_refuses_what_no_backend_is_asked_about() -> None:
    questions = [
        {"act_format": "nonsense"},
        {"op": "grouped_gemm", "format": "mxfp8", "act_format": "mxfp4"},
        {"packed": True},
        {"format": "nvfp4", "hidden_size": 33, "intermediate_size": 31},
        {"activation": "foo"},
        {"op": "grouped_gemm", "n": 64, "k": 64, "b_parts": 0},
    ]
    lines = []
    for question in questions:
        with pytest.raises(RuntimeError) as caught:
            moe.explain(device="cpu", **question)
        lines.append(str(caught.value))
    assert_expected_inline(
        "\n".join(lines),
        """\
fused_moe: act_format: expected bf16 for bf16 weights, got nonsense
grouped_gemm: act_format: expected mxfp8 or bf16 or fp16 for mxfp8 weights, got mxfp4
fused_moe: packed: expected False for bf16, got True
fused_moe: hidden_size: expected a multiple of 2 for nvfp4, got 33
fused_moe: activation: expected one of silu, gelu, gelu_tanh, relu, swiglustep, relu2_no_mul, gelu_no_mul, silu_no_mul, got foo
grouped_gemm: b_parts: expected at least 1, got 0""",  # noqa: E501
    )


def test_explain_refuses_impossible_facts() -> None:
    questions = [
        {"device": "cuda", "sm": "90"},
        {"sm": 9.0},
        {"sm": 0},
        {"device": "cpu", "sm": 90},
        {"sm": 90, "num_experts": -3},
        {"sm": 90, "top_k": 0},
        {"sm": 90, "top_k": True},
        {"op": "grouped_gemm", "sm": 90, "n": 64, "k": "64"},
        {"op": "grouped_gemm", "sm": 90, "b_parts": 2.0},
        {"op": "grouped_gemm", "device": "cpu", "n": 7, "k": 8, "b_parts": 2},
        {"op": "topk", "device": "cpu", "top_k": 10, "num_experts": 4},
        {"sm": 90, "out_dtype": "bf16"},
        {"sm": 90, "out_dtype": torch.float64},
        {"sm": 90, "bias_dtype": torch.int8},
    ]
    lines = []
    for question in questions:
        with pytest.raises(RuntimeError) as caught:
            moe.explain(**question)
        lines.append(str(caught.value))
    assert_expected_inline(
        "\n".join(lines),
        """\
explain: sm: expected a whole number, got '90'
explain: sm: expected a whole number, got 9.0
explain: sm: expected at least 1, got 0
explain: sm: expected none for cpu, got 90
fused_moe: num_experts: expected at least 1, got -3
fused_moe: top_k: expected at least 1, got 0
fused_moe: top_k: expected a whole number, got True
grouped_gemm: k: expected a whole number, got '64'
grouped_gemm: b_parts: expected a whole number, got 2.0
grouped_gemm: n: expected a multiple of 2, which b_parts is, got 7
topk: top_k: expected 1 to 4, got 10
fused_moe: out_dtype: expected one of bfloat16, float16, float32, got bf16
fused_moe: out_dtype: expected one of bfloat16, float16, float32, got float64
fused_moe: bias_dtype: expected one of bfloat16, float16, float32, got int8""",
    )
    assert moe.explain(device="cpu", top_k=8, num_experts=4).backend == "reference"  # local experts


def test_other_devices_have_the_reference_by_name() -> None:
    for device in ("xpu", "mps", "meta"):
        explanation = moe.explain(device=device)
        assert explanation.problem.built == {"reference"}
        reasons = [verdict.reason for verdict in explanation.verdicts]
        assert set(reasons[:-1]) == {f"needs a CUDA device, got {device}"}
        assert reasons[-1] == f"there is no backend for {device} tensors; plain torch runs only when called by name"


def test_backends_called_by_name_check_inside_a_custom_op() -> None:
    """Its body runs below autograd."""

    @library.custom_op("moe_test::topk_by_name", mutates_args=())
    def topk_by_name(logits: torch.Tensor) -> torch.Tensor:
        return torch.ops.moe.topk.reference(logits, 2)[0]

    logits = torch.randn(3, 8)
    assert torch.equal(topk_by_name(logits), torch.ops.moe.topk(logits, 2)[0])
    with pytest.raises(RuntimeError, match="^topk: router_logits: expected "):
        topk_by_name(logits.double())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch._C._AutoDispatchBelowAutograd])
def test_backends_called_by_name_check_in_front_of_their_kernel(monkeypatch: pytest.MonkeyPatch, mode: type) -> None:
    """Here of one that checks nothing. The op itself, which remembers what it checked, calls the kernel alone."""
    checked, called, expect_choice = [], [], topk.expect_choice
    monkeypatch.setattr(topk, "expect_choice", lambda *args: checked.append(args) or expect_choice(*args))
    logits = torch.randn(3, 1021)
    with library._scoped_library("moe", "IMPL") as kernels, mode():
        kernels.impl("topk.reference", lambda *args: called.append(args) or (torch.empty(0), torch.empty(0)), "CPU")
        with pytest.raises(RuntimeError, match="^topk: router_logits: expected "):
            torch.ops.moe.topk.reference(logits.double(), 2)
        assert not called
        torch.ops.moe.topk.reference(logits, 2)
        assert len(checked) == len(called) == 1
        torch.ops.moe.topk(logits, 2)
        checked.clear()
        torch.ops.moe.topk(logits, 2)
        assert not checked and len(called) == 3


def test_explain_wants_both_sizes_or_none() -> None:
    for op, options in (
        ("fused_moe", {"hidden_size": 7}),
        ("grouped_gemm", {"k": 7}),
        ("grouped_gemm", {"n": 7, "k": 0}),
    ):
        with pytest.raises(RuntimeError, match=rf"^{op}: \w+: expected (a size|at least 1), .*got (None|0)$"):
            moe.explain(op, sm=90, **options)
