"""python -m torch_moe_ops: what it prints, what it returns, and that it can tell right from wrong."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

import torch_moe_ops as moe
from torch_moe_ops import backends
from torch_moe_ops.cli import _layer, bench, demo, main
from torch_moe_ops.cli import bench as cli_bench
from torch_moe_ops.cli.bench import compare, host, measure, results, stages

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


def run(capsys, *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(argv)
    return status, *capsys.readouterr()


def test_module_entry_point_lists_the_commands():
    help_text = subprocess.run(
        [sys.executable, "-m", "torch_moe_ops", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in ("bench", "demo", "explain", "info"):
        assert f"    {command}" in help_text
    assert "_layer" not in help_text


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["explain", "--format", "fp7"],
        ["explain", "--sm", "0"],
        ["explain", "--top-k", "0"],
        ["bench", "--cases", "nope"],
        ["bench", "--tiny", "--budget-s", "nan"],
    ],
)
def test_bad_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["explain", "--top-k", "x"], "argument --top-k: expected a positive whole number, got x"),
        (["explain", "--top-k", "1.5"], "argument --top-k: expected a positive whole number, got 1.5"),
        (["bench", "--tokens", "1,x"], "argument --tokens: expected positive numbers, got 1,x"),
        (["bench", "--budget-s", "x"], "argument --budget-s: expected a number that is not negative, got x"),
    ],
)
def test_what_is_no_number_is_refused_like_a_wrong_one(argv, expected, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert capsys.readouterr().err.endswith(f"error: {expected}\n")


@CPU_ONLY
@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["bench", "--tiny", "--tokens", "8192"], "bench: --tokens: expected at most 128 with --tiny, got [8192]"),
        (
            ["bench", "--tiny", "--json", "/nonexistent/x"],
            "bench: --json: expected a file that can be written, got /nonexistent/x: No such file or directory",
        ),
        (
            ["bench", "compare", "/nonexistent", "--baseline", "x"],
            "bench: ours: expected a result file, got /nonexistent: No such file or directory",
        ),
        (["demo", "--device", "cuda"], "demo: --device: expected cpu where there is no CUDA GPU, got cuda"),
    ],
)
def test_what_a_user_can_mend_is_one_line(argv, sentence, capsys):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith(sentence) and err.count("\n") == 1


@pytest.mark.parametrize(
    "text, got",
    [
        ("", "expected a result file, a JSON object a line, got NoneType"),
        ("[1]\n", "expected a result file, a JSON object a line, got list"),
        ("text\n", "expected JSON Lines, got Expecting value: "),
        ('{}\n{"us": 1}\n', "expected points with case, format and tokens, got one without 'case'"),
        ('{}\n{"case": "a", "format": null, "tokens": 1}\n', "expected points with names and a number of tokens, got "),
        (
            '{}\n{"case": "a", "format": "b", "tokens": 1, "us": "2"}\n',
            "expected points whose us is a positive number, ",
        ),
    ],
)
def test_foreign_result_files_are_refused(text, got, capsys, tmp_path):
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(text)
    status, out, err = run(capsys, "bench", "compare", str(foreign), "--baseline", str(foreign))
    assert (status, out) == (2, "") and got in err and err.count("\n") == 1


def test_output_that_nobody_reads_any_more():
    command = [sys.executable, "-m", "torch_moe_ops", "info", "--table"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_info_is_json(capsys):
    status, out, _ = run(capsys, "info", "--json")
    assert status == 0 and json.loads(out)["torch"] == torch.__version__


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_explain_gives_a_reason_for_every_no(capsys):
    argv = ("explain", "--format", "fp8_block", "--hidden", "7168", "--intermediate", "2048", "--sm", "75")
    status, out, _ = run(capsys, *argv, "--json")
    answer = json.loads(out)
    assert status == 1 and answer["backend"] is None
    assert [gemm[:2] for gemm in answer["problem"]["gemms"]] == [[4096, 7168], [7168, 2048]]
    assert all(verdict["reason"] for verdict in answer["verdicts"])
    status, out, _ = run(capsys, *argv)
    for verdict in answer["verdicts"]:
        assert verdict["backend"] in out and verdict["reason"] in out


def test_explain_takes_the_sizes_of_the_op_alone(capsys, monkeypatch):
    monkeypatch.setattr(backends, "built_backends", lambda op, device_type: frozenset(backends.CANDIDATES[op]))
    gemm = ("explain", "--op", "grouped_gemm", "--format", "fp8_block", "--sm", "90")
    assert "K" in run(capsys, *gemm, "--n", "128", "--k", "100")[1]
    status, _, err = run(capsys, *gemm, "--intermediate", "100")
    assert (status, err) == (2, "explain: grouped_gemm: intermediate_size: expected None for grouped_gemm, got 100\n")


def test_explain_takes_dtypes_and_parts(capsys):
    """Each is in the problem, and what its backends say of it is what the Python function says."""
    gemm = ("explain", "--op", "grouped_gemm", "--format", "fp8_block", "--sm", "90", "--n", "384", "--k", "256")
    facts = dict(op="grouped_gemm", format="fp8_block", sm=90, n=384, k=256)
    for flag, text, fact in (
        ("--b-parts", "2", {"b_parts": 2}),
        ("--out-dtype", "float16", {"out_dtype": torch.float16}),
        ("--bias-dtype", "float32", {"bias_dtype": torch.float32}),
    ):
        assert run(capsys, *gemm, flag, text)[1] == f"{moe.explain(**facts, **fact)}\n"
        [(name, value)] = fact.items()
        problem = json.loads(run(capsys, *gemm, flag, text, "--json")[1])["problem"]
        assert problem["gemms"] == [[384, 256, 2 if name == "b_parts" else 1]]
        assert name == "b_parts" or problem[name] == text


@CPU_ONLY
def test_explain_about_a_gpu_that_is_not_there():
    with pytest.raises(
        RuntimeError, match="^explain: device: expected cpu, or sm, where there is no CUDA GPU, got cuda$"
    ):
        moe.explain(device="cuda")


def test_explain_without_a_gpu_is_about_the_cpu(capsys):
    status, out, _ = run(capsys, "explain", "--json")
    assert status == 0 and json.loads(out)["backend"] == "reference"


# ---- demo ------------------------------------------------------------------------------------------------------------


@CPU_ONLY
def test_demo(capsys):
    status, out, _ = run(capsys, "demo", "--formats", "bf16", "mxfp4", "--json")
    rows = json.loads(out)
    assert status == 0 and [row["format"] for row in rows] == ["bf16", "mxfp4"]
    for row in rows:
        assert row["backend"] == "reference" and row["ok"] and row["compiled"] and row["graph"] is None
        assert 0 < row["error"] < row["tolerance"]


def demo_with(capsys, monkeypatch, experts_call) -> tuple[int, str]:
    monkeypatch.setattr(_layer.Experts, "forward", experts_call)
    status, out, _ = run(capsys, "demo", "--formats", "bf16", "--device", "cpu", "--no-compile")
    return status, out.splitlines()[-1]


def test_demo_notices_a_wrong_answer(capsys, monkeypatch):
    right = _layer.Experts.forward
    assert demo_with(capsys, monkeypatch, right)[0] == 0

    def one_wrong_expert(self, hidden_states, topk_weights, topk_ids):
        return right(self, hidden_states, topk_weights, torch.where(topk_ids == 3, 4, topk_ids))

    status, line = demo_with(capsys, monkeypatch, one_wrong_expert)
    assert status == 1 and line.endswith("WRONG")

    def not_a_number(self, hidden_states, *routing):
        return right(self, hidden_states, *routing).masked_fill_(hidden_states > 3, math.nan)

    status, line = demo_with(capsys, monkeypatch, not_a_number)
    assert status == 1 and line.endswith("WRONG")
    _, out, _ = run(capsys, "demo", "--formats", "bf16", "--device", "cpu", "--no-compile", "--json")
    [row] = json.loads(out, parse_constant=pytest.fail)  # NaN is no JSON
    assert row["error"] is None and not row["ok"]

    def raises(self, *inputs):
        raise ValueError("two\nlines")

    status, line = demo_with(capsys, monkeypatch, raises)
    assert status == 1 and line.endswith("FAILED: two lines")


def test_demo_notices_a_compiled_layer_that_differs(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda layer, **options: lambda *inputs: layer(*inputs) * 1.01)
    status, out, _ = run(capsys, "demo", "--formats", "bf16", "--device", "cpu")
    assert status == 1 and "DIFFERS" in out


# ---- bench -----------------------------------------------------------------------------------------------------------


@CPU_ONLY
def test_bench_needs_a_gpu(capsys):
    status, out, err = run(capsys, "bench")
    assert (status, out) == (2, "")
    assert err == "bench: device: expected a CUDA GPU, got none (--tiny runs a small layer on the CPU)\n"


def test_tiny_bench_writes_every_point(capsys, tmp_path):
    path = tmp_path / "points.jsonl"
    argv = ("bench", "--tiny", "--formats", "fp8_block", "--tokens", "1", "--stages", "--commit", "abc")
    status, out, _ = run(capsys, *argv, "--json", str(path))
    header, points = results.read_results(path)
    assert status == 0
    assert set(header) == {"commit", "gpu", "driver", "torch", "triton", "date"} and header["commit"] == "abc"
    names = ["topk", "sort_slots", "permute", "grouped_gemm_w13", "act_mul", "grouped_gemm_w2", "finalize"]
    assert [point["what"] for point in points] == ["fused_moe", *names]
    for point in points:
        assert point["case"] == "tiny" and point["format"] == "fp8_block" and point["tokens"] == 1
        assert point["routing"] == "uniform"
        assert point["ok"] and point["us"] > 0 and point["backend"] and 0 < point["err"] < 0.08
        assert point["what"] in out


def test_gemm_times_the_two_gemms_only(capsys, monkeypatch, tmp_path):
    timed = []

    def time_calls(call, inputs):
        timed.append(call.__name__)
        return 1.0, 1.0, [call(*i) for i in inputs]

    monkeypatch.setattr(stages, "time_calls", time_calls)
    path = tmp_path / "points.jsonl"
    argv = ("bench", "--tiny", "--formats", "fp8_block,bf16", "--tokens", "8", "--gemm", "--json", str(path))
    assert run(capsys, *argv)[0] == 0
    points = results.read_results(path)[1]
    assert timed == 2 * ["grouped_gemm_w13", "grouped_gemm_w2"]
    assert [point["what"] for point in points] == 2 * ["fused_moe", *timed[:2]]
    assert all(point["ok"] for point in points)
    hidden, intermediate = _layer.TINY.hidden_size, _layer.TINY.intermediate_size
    for point, n, k in ((points[1], 2 * intermediate, hidden), (points[2], hidden, intermediate)):
        assert point["us"] == 1.0 and point["tflops"] == round(2 * point["slots"] * n * k / 1e6, 2)


def test_topk_is_timed_as_the_model_routes():
    """By groups, with sigmoid scores and a bias, where the model does so."""
    experts = _layer.make_experts(_layer.TINY, "bf16", device="cpu")
    logits, bias = torch.randn(5, 8), torch.randn(8)
    state = {"router_logits": logits, "correction_bias": bias, "topk_ids": torch.zeros(5, 2)}

    def chosen(case: _layer.Case) -> list[torch.Tensor]:
        return list(stages.stages(case, experts, lambda op: getattr(torch.ops.moe, op))["topk"][1](state).values())

    groups = {"num_groups": 4, "topk_groups": 1}
    grouped = torch.ops.moe.topk(logits, 2, scoring="sigmoid", correction_bias=bias, **groups)
    assert all(map(torch.equal, chosen(replace(_layer.TINY, **groups)), grouped))
    assert all(map(torch.equal, chosen(_layer.TINY), torch.ops.moe.topk(logits, 2)))


def test_stages_that_nobody_has_leave_the_layer(capsys, monkeypatch, tmp_path):
    def refused(*args, **options):
        raise RuntimeError("grouped_gemm: no backend")

    monkeypatch.setattr(cli_bench, "measure_stages", refused)
    path = tmp_path / "points.jsonl"
    argv = ("bench", "--tiny", "--formats", "bf16", "--tokens", "1", "--gemm", "--json", str(path))
    assert run(capsys, *argv)[0] == 1
    layer, failed = results.read_results(path)[1]
    assert layer["what"] == "fused_moe" and layer["ok"]
    assert (failed["what"], failed["ok"], failed["error"]) == ("stages", False, "grouped_gemm: no backend")


def test_zipf_bench_says_so(capsys, tmp_path):
    path = tmp_path / "points.jsonl"
    argv = ("bench", "--tiny", "--formats", "bf16", "--tokens", "8", "--routing", "zipf", "--gemm", "--json", str(path))
    status, out, _ = run(capsys, *argv)
    points = results.read_results(path)[1]
    assert status == 0 and len(points) == 3 and out.count(" zipf ") == 3
    assert all(point["routing"] == "zipf" and point["ok"] for point in points)


@CPU_ONLY
def test_host_needs_a_gpu(capsys, tmp_path):
    path = tmp_path / "points.jsonl"
    argv = ("bench", "--tiny", "--formats", "bf16", "--tokens", "1,8", "--host", "--json", str(path))
    status, _, err = run(capsys, *argv)
    assert status == 0 and [point["what"] for point in results.read_results(path)[1]] == 2 * ["fused_moe"]
    assert_expected_inline(err, """bench: --host: expected a CUDA GPU, got none (no host time is measured)\n""")


def test_host_call_is_the_median_of_batches(monkeypatch):
    """A clock that only the test moves: a batch costs 1 us a call, the first one and every fifth 100 us."""
    now, calls, waits = 0.0, 0, 0

    def call(*inputs):
        nonlocal now, calls
        slow = calls // host.BATCH_CALLS % 5 == 0
        now, calls = now + (1e-4 if slow else 1e-6), calls + 1

    def synchronize():
        nonlocal now, waits
        now, waits = now + 1.0, waits + 1

    monkeypatch.setattr(host, "fused_moe_call", lambda experts, backend: call)
    monkeypatch.setattr(host.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    experts = _layer.make_experts(_layer.TINY, "bf16", device="cpu")
    point = host.measure_host_call(_layer.TINY, experts, 8, None, "zipf")
    assert (point.what, point.tokens, point.routing, point.ok) == ("host_call", 8, "zipf", True)
    assert point.us == pytest.approx(1.0) and point.us_min == pytest.approx(1.0)
    assert calls == host.BATCH_CALLS * (1 + host.BATCHES) and waits == 2 + host.BATCHES
    assert str(point).split()[5:] == ["1.0", "-", "-", "-", "-", point.backend]
    assert point.record()["tbps"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_host_call_on_a_gpu(capsys, tmp_path):
    path = tmp_path / "points.jsonl"
    argv = ("bench", "--tiny", "--formats", "bf16", "--tokens", "8", "--host", "--json", str(path))
    assert run(capsys, *argv)[0] == 0
    point = results.read_results(path)[1][-1]
    assert point["what"] == "host_call" and point["ok"] and 1 < point["us_min"] <= point["us"] < 5000


def test_bench_notices_wrong_and_failed_points(capsys, monkeypatch, tmp_path):
    argv = ("bench", "--tiny", "--formats", "bf16", "--tokens", "1", "--json", str(tmp_path / "points.jsonl"))
    monkeypatch.setattr(measure, "time_calls", lambda call, inputs: (1.0, 1.0, [call(*i) * 1.1 for i in inputs]))
    status, out, _ = run(capsys, *argv)
    assert status == 1 and "WRONG" in out
    monkeypatch.setattr(measure, "time_calls", lambda call, inputs: (1.0, 1.0, [call(*i) / 0 for i in inputs]))
    assert run(capsys, *argv)[0] == 1
    assert results.read_results(tmp_path / "points.jsonl")[1][0]["err"] is None  # JSON has no infinity
    monkeypatch.setattr(measure, "routing_counts", None)

    def fail(call, inputs):
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr(measure, "time_calls", fail)
    status, out, _ = run(capsys, *argv)
    assert status == 1 and "failed: no kernel" in out


@pytest.mark.parametrize("gpu_ms, rounds", [(0.004, 7), (0.05, 2), (0.3, 1)])
def test_short_calls_are_repeated_within_a_graph(monkeypatch, gpu_ms: float, rounds: int):
    """A replay takes the host 16 us at least, and must not hide how long the GPU takes."""
    monkeypatch.setattr(measure, "_capture", lambda call, inputs, rounds: (rounds, [call(*i) for i in inputs]))
    monkeypatch.setattr(measure, "_replay_ms", lambda graph, count: [max(0.016, gpu_ms * graph)] * count)
    us, us_min, outputs = measure._time_graph(lambda x: x + 1, [(1,), (2,)], 40.0)
    assert us == us_min == pytest.approx(1e3 * gpu_ms / 2) and outputs == [2, 3]
    assert measure._replay_ms(rounds, 1)[0] > 0.016


@CPU_ONLY
def test_formats_that_do_not_go_together_fail_as_points(capsys, tmp_path):
    path = tmp_path / "x.jsonl"
    argv = ("bench", "--tiny", "--tokens", "1", "--formats", "bf16,fp8_block", "--act-format", "fp8_block")
    status, out, _ = run(capsys, *argv, "--json", str(path))
    assert status == 1 and "failed: Experts: act_format: expected " in out
    points = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [(point["format"], point["ok"]) for point in points] == [("bf16", False), ("fp8_block", True)]


def test_budget_skips_the_rest(capsys):
    status, _, err = run(capsys, "bench", "--tiny", "--tokens", "1,8", "--budget-s", "0")
    assert status == 0 and err == "bench: 4 points skipped: the budget of 0 s is spent\n"


def test_cases_and_inputs():
    """The sizes by hand; ids of other ranks are -1, and token 0 always has a local expert."""
    sizes = {case.name: tuple(vars(case).values())[1:6] for case in _layer.CASES.values()}
    assert sizes == {
        "dsv3_ep8": (32, 256, 7168, 2048, 8),
        "dsv3_tp8": (256, 256, 7168, 256, 8),
        "qwen30b": (128, 128, 2048, 768, 8),
        "qwen235b_tp4": (128, 128, 4096, 384, 8),
        "mixtral": (8, 8, 4096, 14336, 2),
        "gptoss": (128, 128, 2880, 2880, 4),
        "dsv2": (160, 160, 5120, 1536, 6),
        "e16_top1": (16, 16, 6144, 2560, 1),
        "kimi_k2_ep8": (48, 384, 7168, 2048, 8),
        "dsv4pro_ep8": (48, 384, 7168, 3072, 6),
    }
    groups = {case.name: (case.num_groups, case.topk_groups) for case in _layer.CASES.values() if case.num_groups > 1}
    assert groups == {"dsv3_ep8": (8, 4), "dsv3_tp8": (8, 4)}
    assert list(sizes) == [*bench.case_names("default"), *bench.case_names("untuned")] == bench.case_names("all")
    assert len(bench.case_names("default")) == 6
    assert bench.case_names("mixtral,untuned,dsv2,mixtral") == ["mixtral", *bench.case_names("untuned")]
    assert measure.GRAPH_CALLS == {1: 8, 8: 8, 32: 4, 128: 4, 512: 2, 2048: 2, 8192: 1} and len(bench.TOKENS) == 7
    case = _layer.Case("rank", 4, 64, 128, 64, 4)
    generator = torch.Generator().manual_seed(0)
    for routing, index in itertools.product(_layer.ROUTINGS, range(8)):
        hidden_states, topk_weights, topk_ids = _layer.make_inputs(case, 50, generator, index, routing=routing)
        assert (topk_ids[0] == (5 * index + 3) % 4).any()
        assert topk_ids.min() == -1 and topk_ids.max() < 4
        assert all(len(set(ids)) == len(ids) for ids in ([i for i in row if i >= 0] for row in topk_ids.tolist()))
        assert hidden_states.dtype == torch.bfloat16 and topk_weights.dtype == torch.float32
    hit, slots = measure.routing_counts(
        [(None, None, torch.tensor([[0, 1], [1, -1]])), (None, None, torch.tensor([[2, -1]]))]
    )
    assert (hit, slots) == (1.5, 2.0)


def test_zipf_draws_without_replacement():
    """First and second expert of 100000 tokens against the probabilities p[i] and p[i] p[j] / (1 - p[i])."""
    num_tokens, num_experts = 100_000, 8
    case = _layer.Case("zipf", num_experts, num_experts, 1, 1, 2)
    orders = []
    for index in range(2):
        generator = torch.Generator().manual_seed(7)
        first, second = _layer.make_inputs(case, num_tokens, generator, index, routing="zipf")[2].long().unbind(1)
        counts = torch.bincount(first * num_experts + second, minlength=num_experts**2).view(num_experts, num_experts)
        order = counts.sum(dim=1).argsort(descending=True)
        orders.append(order.tolist())
        p = 1 / torch.arange(1.0, num_experts + 1)
        p /= p.sum()
        pairs = (p[:, None] * p / (1 - p[:, None])).fill_diagonal_(0)
        deviation = 5 * (num_tokens * pairs * (1 - pairs)).sqrt()  # of 112 tails: one seed in 10000 fails
        assert ((counts[order][:, order] - num_tokens * pairs).abs() <= deviation).all()
    assert orders[0] != orders[1]  # each call has popular experts of its own


def test_zipf_gives_a_rank_its_share():
    """The first call, the only one at 8192 tokens: 1/8 of the slots to one rank of 8, within 15 %."""
    for name in ("dsv3_ep8", "kimi_k2_ep8", "dsv4pro_ep8"):
        case = replace(_layer.CASES[name], hidden_size=1, intermediate_size=1)
        topk_ids = _layer.make_inputs(case, 8192, torch.Generator().manual_seed(0), routing="zipf")[2]
        assert 0.85 / 8 < (topk_ids >= 0).float().mean() < 1.15 / 8


def test_floor(monkeypatch):
    """dsv3_ep8 in fp8, all 32 experts hit: 1.4 GB of weights, or the FLOPs of 8192 tokens' slots."""

    class Weight:
        class device:
            type = "cuda"

    class FakeExperts:
        w13, format, act_format = Weight, "fp8_block", ""

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    weight_bytes, flops = 32 * 3 * 7168 * 2048, 6 * 8192 * 7168 * 2048
    assert measure.floor_us(weight_bytes, 0, FakeExperts) == pytest.approx(weight_bytes / 4.6e12 * 1e6)
    assert measure.floor_us(0, flops, FakeExperts) == pytest.approx(flops / 1463e12 * 1e6)
    FakeExperts.format = "bf16"
    assert measure.floor_us(0, flops, FakeExperts) == pytest.approx(flops / 812e12 * 1e6)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    assert measure.floor_us(weight_bytes, flops, FakeExperts) is None


def write(path, name, *points):
    lines = [{"name": name}] + [dict(zip(("case", "format", "tokens", "us", "ok"), p, strict=True)) for p in points]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_compare(capsys, tmp_path):
    ours = write(
        tmp_path / "ours.jsonl",
        "x",
        ("a", "bf16", 1, 10.0, True),
        ("a", "bf16", 8, 50.0, True),
        ("b", "bf16", 1, 9.0, True),
    )
    wrong = ("a", "bf16", 1, 1.0, False)
    first = write(tmp_path / "first.jsonl", "first", wrong, ("a", "bf16", 1, 40.0, True), ("c", "bf16", 1, 9.0, True))
    second = write(tmp_path / "second.jsonl", "second", ("a", "bf16", 1, 20.0, True), ("a", "bf16", 8, 25.0, True))
    argv = ("bench", "compare", ours, "--baseline", first, second, "--json", str(tmp_path / "table.jsonl"))
    status, out, _ = run(capsys, *argv)
    assert status == 0
    table = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [(row["tokens"], row["best"], row["speedup"]) for row in table] == [(1, "second", 2.0), (8, "second", 0.5)]
    assert "fused_moe, uniform routing: geometric mean of 2 speedups: 1.000" in out
    assert f"not in {ours}: c bf16 1 uniform fused_moe" in out
    assert compare.geomean([2.0, 8.0]) == pytest.approx(4.0)
    assert "below" not in out
    shared = ("bench", "compare", ours, "--baseline", second)
    status, out, _ = run(capsys, *shared, "--least", "0.5")
    assert status == 0 and "below" not in out
    status, out, _ = run(capsys, *shared, "--least", "0.98")
    assert (status, out.splitlines()[-1]) == (1, "below 0.98: a bf16 8 uniform fused_moe 0.500")
    status, out, _ = run(capsys, *argv, "--least", "0.5")  # a point that is gone, or wrong now, is slower than any
    assert (status, out.splitlines()[-1]) == (1, f"not in {ours}: c bf16 1 uniform fused_moe")
    status, out, err = run(capsys, "bench", "compare", ours, "--baseline", second, str(tmp_path))
    refusal = f"bench: --baseline: expected result files, got {tmp_path}: Is a directory\n"
    assert (status, out, err) == (2, "", refusal)
    status, out, err = run(capsys, *shared, "--json", str(tmp_path))
    refusal = f"bench: --json: expected a file that can be written, got {tmp_path}: Is a directory\n"
    assert (status, out, err) == (2, "", refusal)
    none = write(tmp_path / "none.jsonl", "none")
    status, out, err = run(capsys, "bench", "compare", ours, "--baseline", none)
    assert (status, out, err) == (2, "", f"bench: expected points that {ours} and a baseline share, got none\n")


def test_compare_sets_like_beside_like():
    """Old files hold no routing: theirs is uniform. Stages and routings are never mixed with one another."""
    point = dict(case="a", format="bf16", tokens=1, us=10.0, ok=True)
    zipf, gemm = point | {"routing": "zipf", "us": 6.0}, point | {"what": "grouped_gemm_w13", "us": 4.0}
    old = [peer | {"peer": "old"} for peer in (point | {"us": 20.0}, gemm | {"us": 2.0})]
    ours = [point | {"routing": "uniform", "what": "fused_moe"}, zipf, gemm | {"routing": "uniform"}]
    assert [(row.what, row.routing, row.speedup) for row in compare.compare(ours, old)] == [
        ("fused_moe", "uniform", 2.0),
        ("grouped_gemm_w13", "uniform", 0.5),
    ]
    assert compare.compare([zipf], old) == []
    assert compare.missing(ours[:1], old) == []  # nobody timed the GEMMs here
    other = [old[0] | {"case": "b"}, old[1] | {"case": "b"}]
    assert [(key.case, key.what) for key in compare.missing(ours[:1], other)] == [("b", "fused_moe")]


def test_peers_of_the_gemms():
    """Every GEMM of the peers' file is one that `bench --gemm` times, of the layouts DeepGEMM has."""
    path = Path(__file__).parents[1] / "benchmarks" / "peers_h200.jsonl"
    gemms = [point for point in results.read_results(path)[1] if point["what"] != "fused_moe"]
    assert {point["what"] for point in gemms} == set(stages.GEMMS) and len(gemms) == 196
    assert {point["peer"] for point in gemms} == {"DeepGEMM contiguous", "DeepGEMM masked"}
    for point in gemms:
        case = _layer.CASES[point["case"]]
        weight = case.hidden_size * case.intermediate_size * (2 if point["what"] == "grouped_gemm_w13" else 1)
        slots = point["tflops"] * point["us"] * 1e6 / (2 * weight)
        expected = point["tokens"] * case.top_k * case.num_experts / case.num_router_experts
        assert point["format"] in ("bf16", "fp8_block") and point["ok"]
        if point["tokens"] >= 512:  # fewer are too uneven over the ranks, or rounded away
            assert slots == pytest.approx(expected, rel=0.1)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    kinds = (("bf16", "uniform"), ("int8", "uniform"), ("int8", "zipf"))
    rows = [
        compare.Comparison("a", format, n, routing, "fused_moe", 1.0, 2.0, "peer", 2.0, None)
        for (format, routing), n in itertools.product(kinds, (1, 8))
    ]
    compare.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_demo_row_verdicts():
    row = dict(layer="small", format="bf16", backend="reference", error=0.1, tolerance=0.2, compiled=True)
    assert demo.Row(**row).ok and demo.Row(**row, graph=True).ok
    assert not demo.Row(**row, graph=False).ok
    assert not demo.Row(**row | {"compiled": False}).ok
    assert not demo.Row(**row | {"error": math.nan}).ok
    assert not demo.Row(**row | {"error": 0.3}).ok
    assert demo.Row("small", "nvfp4", None, note="no backend").ok
