"""The SM90 tactics: one rule in C++ and in benchmarks/tune.py, thresholds that are what the fit gives, and the fit."""

from __future__ import annotations

import math
import random
import re
from dataclasses import astuple, replace
from itertools import product

import pytest
import torch
import tune
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

TABLE = tune.read_table(tune.TABLE.read_text())
NUM_SMS = 132


def measured_facts(elements: str) -> list[tune.Facts]:
    """The points of `tune.py measure`."""
    return [
        tune.Facts(elements, tokens * top_k, *sizes, NUM_SMS)
        for (*sizes, top_k), tokens in product(tune.LAYERS, tune.TOKENS)
    ]


# ---- one rule --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host():
    return pytest.importorskip("torch_moe_ops._host", reason="needs the optional module, which is built with pybind11")


def in_cxx(facts: tune.Facts) -> tuple[object, ...]:
    elements, *rest = astuple(facts)
    return (tune.ELEMENTS.index(elements), *rest)


@st.composite
def layers(draw: st.DrawFn) -> tune.Facts:
    """Rows close to a threshold of rows an expert as often as not."""
    num_experts = draw(st.integers(1, 1024))
    near = st.sampled_from([8, 12, 48]).flatmap(lambda n: st.integers(n * num_experts - 1, n * num_experts + 1))
    near |= st.integers(tune.MAX_SPLIT_SLOTS - 1, tune.MAX_SPLIT_SLOTS + 1)
    return tune.Facts(
        draw(st.sampled_from(tune.ELEMENTS)),
        draw(near | st.integers(1, 200_000)),
        num_experts,
        8 * draw(st.integers(1, 2048)),
        draw(st.sampled_from([512, 520, 4088, 4096]) | st.integers(1, 2048).map(lambda n: 8 * n)),
        draw(st.sampled_from([NUM_SMS, 114, 78, 16])),
        *(draw(st.booleans()) for _ in range(2)),
        draw(st.sampled_from([1.0, 0.125, 1 / 3])),
        draw(st.booleans()),
    )


@settings(max_examples=1500, deadline=None)
@given(facts=layers())
def test_the_rule_is_the_same_in_cxx(host, facts: tune.Facts) -> None:
    chosen = tune.choose_tactic(facts, TABLE[facts.elements])
    assert host.choose_tactic(in_cxx(facts)) == chosen
    assert chosen in host.possible_tactics(in_cxx(facts))


@settings(max_examples=300, deadline=None)
@given(
    hit=st.floats(0, 64),
    part_rows=st.integers(1, 2048).map(lambda n: 8 * n),
    parts=st.sampled_from([1, 2]),
    num_sms=st.sampled_from([NUM_SMS, 16]),
    most=st.sampled_from([32, 64, 128, 256]),
    halves=st.booleans(),
)
def test_rows_of_split_tiles(
    host, hit: float, part_rows: int, parts: int, num_sms: int, most: int, halves: bool
) -> None:
    """The fewest rows that give no SM more tiles than the most rows do."""

    def rounds(rows: int) -> int:
        return math.ceil(hit * parts * math.ceil(part_rows / rows) / num_sms)

    possible = [64, 128, 256] if halves else range(40, most, 8)
    least, step = (64, 0) if halves else (40, 8)
    fewest = min([rows for rows in possible if rows < most and rounds(rows) == rounds(most)], default=most)
    assert host.split_rows(hit, part_rows, parts, num_sms, most, least, step) == fewest


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "part_rows", "parts", "bytes_of_weight_row", "expected"),
    [
        (8, 256, 256, 2, 7168, 64),  # DeepSeek-V3 TP8's w13, one token: 32 tiles of 128 rows
        (8, 32, 2048, 2, 14336, 64),  # EP8's: 256 if all experts are local, 56 as a rule
        (8, 32, 7168, 1, 2048, 128),  # EP8's w2: 448
        (8, 32, 2048, 2, 0, 128),  # packed
        (16, 128, 2048, 1, 768, 128),  # Qwen3-30B's w2, two tokens: 256 short ones
        (1024, 1, 4096, 1, 8192, 128),  # dense: 256, but not few tokens
        (8192, 32, 2048, 2, 7168, 256),  # EP8, 8192 tokens
    ],
)
def test_rows_of_a_single_gemm(host, num_rows, num_experts, part_rows, parts, bytes_of_weight_row, expected):
    sizes = (num_rows, num_experts, part_rows, parts, bytes_of_weight_row)
    assert host.choose_tile_rows(*sizes, NUM_SMS) == expected


@pytest.mark.parametrize("elements", tune.ELEMENTS)
def test_what_is_timed_is_possible_and_holds_what_is_chosen(host, elements: str) -> None:
    for facts in measured_facts(elements):
        tactics = tune.candidates(facts)
        assert tune.choose_tactic(facts, TABLE[elements]) in tactics
        assert set(tactics) <= set(host.possible_tactics(in_cxx(facts)))


def test_choices() -> None:
    """Well-known layers (experts, hidden, intermediate, top_k). None of them is measured for the table."""
    layers = {
        "dsv3_tp8": (256, 7168, 256, 8),
        "dsv3_ep8": (32, 7168, 2048, 8),
        "qwen30b": (128, 2048, 768, 8),
        "mixtral": (8, 4096, 14336, 2),
        "gptoss": (128, 2880, 2880, 4),
    }
    assert not set(layers.values()) & set(tune.LAYERS)
    lines = []
    for (name, (*sizes, top_k)), tokens in product(layers.items(), (1, 8, 128, 512, 8192)):
        share = 1 / 8 if name == "dsv3_ep8" else 1.0
        facts = [tune.Facts(each, tokens * top_k, *sizes, NUM_SMS, local_share=share) for each in tune.ELEMENTS]
        chosen = (f"{tune.choose_tactic(each, TABLE[each.elements]):<18}" for each in facts)
        lines.append(f"{name:<9}{tokens:>5}  {''.join(chosen)}".rstrip())
    assert_expected_inline(
        "\n".join(lines),
        """\
dsv3_tp8     1  split32           split32           split64           split64
dsv3_tp8     8  split64           split128          gated64           gated64
dsv3_tp8   128  gated64           gated64           gated32           gated64
dsv3_tp8   512  gathered128       gated64           gated64           gated64
dsv3_tp8  8192  gathered128       gathered128       gathered128       gated64
dsv3_ep8     1  split32           split32           split64           split64
dsv3_ep8     8  split64           split128          gated64           gated64
dsv3_ep8   128  gated64           gated64           gated32           gated64
dsv3_ep8   512  gated128          gated64           gated64           gated64
dsv3_ep8  8192  gated128          gated128          gated128          gated64
qwen30b      1  split64           split128          split128          split128
qwen30b      8  gated64           gated64           gated32           gated64
qwen30b    128  gated64           gated64           gated32           gated64
qwen30b    512  gathered128       gated64           gated64           gated64
qwen30b   8192  gathered128       gated128          gated128          gated64
mixtral      1  split64           split128          split256          split128
mixtral      8  gated64           gated64           gated64           gated64
mixtral    128  gated128          gated64           gated64           gated64
mixtral    512  gated128+gemm2    gated128          gated128+gemm2    gated64
mixtral   8192  gated128          gated128          gated128          gated64
gptoss       1  split64           split128          split256          split128
gptoss       8  gated64           gated64           gated32           gated64
gptoss     128  gated64           gated64           gated32           gated64
gptoss     512  gated128          gated64           gated64           gated64
gptoss    8192  gated128          gated128          gated128          gated64""",
    )


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_is_what_its_reader_reads() -> None:
    assert tune.TABLE.read_text() == tune.table_text(TABLE)


@pytest.mark.skipif(not tune.RESULTS.exists(), reason=f"{tune.RESULTS.name} has not been measured yet")
def test_the_table_is_what_the_fit_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["fit", "--check"]) == 0, capsys.readouterr().out


# ---- the fit ---------------------------------------------------------------------------------------------------------


def made_up(elements: str, truth: tune.Constants, noise: float = 0.0) -> list[tune.Timed]:
    """Times by which `truth` is always right: the tactics it does not choose take 10 to 30 % longer."""
    generator, points = random.Random(0), []
    for facts in measured_facts(elements):
        best = tune.choose_tactic(facts, truth)
        us = {
            tactic: 100 * (1 if tactic == best else generator.uniform(1.1, 1.3)) * generator.uniform(1, 1 + noise)
            for tactic in tune.candidates(facts)
        }
        points.append(tune.Timed(str(facts), facts, us))
    return points


@pytest.mark.parametrize(
    "elements, planted",
    [
        ("bits16", {"split_rows": 2}),
        ("float8", {"split_rounds": 6}),
        ("float8", {"split32_rounds": 0.5}),
        ("float8", {"gated64_rows": 24}),
        ("float8", {"gathered_row_tiles": 16}),
        ("packed", {"gated32_rounds": 6}),
        ("packed", {"split256_cost": 1.8}),
        ("packed", {"split64_rounds": 2, "alone_rounds": 0}),
    ],
)
def test_a_planted_threshold_is_found(elements: str, planted: dict[str, float]) -> None:
    points = made_up(elements, replace(TABLE[elements], **planted))
    assert tune.regret(points, TABLE[elements]) > tune.HYSTERESIS
    fitted = tune.fit(elements, points, TABLE[elements])
    assert tune.regret(points, fitted) < tune.HYSTERESIS
    assert tune.fit(elements, points, fitted) == fitted  # what was fitted stays


@pytest.mark.parametrize("elements", tune.ELEMENTS)
def test_noise_does_not_move_the_table(elements: str) -> None:
    points = made_up(elements, TABLE[elements], noise=0.02)
    assert tune.fit(elements, points, TABLE[elements]) == TABLE[elements]


def test_nearest_values_first() -> None:
    assert tune.nearest_first((1, 2, 4, 8), 4) == [2, 8, 1]
    assert tune.nearest_first((1, 2, math.inf), 3) == [2, math.inf, 1]


def test_fit_reads_what_measure_writes(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = dict(num_experts=8, hidden_size=2048, intermediate_size=8192, top_k=2, tokens=160)
    file, header = tmp_path / "times.jsonl", tmp_path / "table.h"
    header.write_text(tune.table_text(TABLE))
    with tune.ResultFile(file, {"num_sms": NUM_SMS}) as results:
        for tactic, us in (("gated64", 200.0), ("gated64+gemm2", 100.0)):
            results.write_record({"format": "fp8_block", **sizes, "tactic": tactic, "us": us})
    [point] = tune.read_points(file)["float8"]
    assert point.us == {"gated64": 200.0, "gated64+gemm2": 100.0} and point.facts.rows_an_expert == 40
    header.write_text(tune.table_text(TABLE | {"float8": replace(TABLE["float8"], alone_rounds=0)}))
    arguments = ["fit", str(file), "--header", str(header)]
    assert (
        tune.main([*arguments, "--check"]) == 1
        and tune.main(arguments) == 0
        and tune.main([*arguments, "--check"]) == 0
    )
    assert "2.0000 -> 1.0000" in capsys.readouterr().out


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, "split64"])
def test_measure(wrong: str | None, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where the op is the reference and knows nothing of tactics."""

    def with_tactic(tactic: str, *args: object, **options: object) -> torch.Tensor:
        return torch.ops.moe.fused_moe.reference(*args, **options) + (tactic == wrong)

    def time_calls(call, inputs, replay_ms: float):
        return 1.0, 1.0, [call(*arguments) for arguments in inputs]

    monkeypatch.setattr(tune, "time_calls", time_calls)
    with library._scoped_library("moe", "IMPL") as moe:
        moe.impl("fused_moe_with_tactic", with_tactic, "CPU")
        tuner = tune.Tuner(tmp_path / "times.jsonl", 1.0, NUM_SMS, "cpu")
        if wrong:
            with pytest.raises(SystemExit, match="split64 gives other bits$"):
                tuner.layer("fp8_block", (4, 256, 128, 2), (1, 48))
            return
        tuner.layer("fp8_block", (4, 256, 128, 2), (1, 48))
    one, many = tune.read_points(tmp_path / "times.jsonl")["float8"]
    assert set(one.us) == {"split32", "split64", "split128", "gated64"}
    assert set(many.us) == {"split32", "split64", "split128", "gated64", "gated128", "gathered128"}
    chosen = [line["tactic"] for line in tune.read_results(tmp_path / "times.jsonl")[1] if line["chosen"]]
    assert chosen == ["split32", "gated64"]


def test_the_fit_refuses_the_benchmarks_layers(tmp_path) -> None:
    sizes = dict(zip(("num_experts", "hidden_size", "intermediate_size", "top_k"), tune.CASES["dsv3_tp8"], strict=True))
    with tune.ResultFile(tmp_path / "times.jsonl", {"num_sms": NUM_SMS}) as results:
        results.write_record({"format": "bf16", **sizes, "tokens": 1, "tactic": "split64", "us": 1.0})
    with pytest.raises(SystemExit, match="fit: .*: expected layers made up for it, got the benchmark's dsv3_tp8$"):
        tune.main(["fit", str(tmp_path / "times.jsonl")])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cases", "dsv3_ep8"], "argument --cases: expected some of dsv3_tp8,[^ ]*, got dsv3_ep8$"),
        (["--formats", "bf16,fp9"], "argument --formats: expected some of bf16,[^\n]*, got bf16,fp9$"),
        (["--tokens", "1,0"], "argument --tokens: expected positive numbers, got 1,0$"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["measure", "--json", "unused.jsonl", *arguments])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("command", [(), ("measure",), ("fit",)])
def test_help(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        tune.main([*command, "--help"])
    assert exit.value.code == 0 and "--help" in capsys.readouterr().out


def test_fit_takes_files_of_measure_alone(capsys, tmp_path) -> None:
    for path in (tune.ROOT / "benchmarks/results/h200_hopper.jsonl", tmp_path / "nothing.jsonl"):
        (tmp_path / "nothing.jsonl").write_text('{"num_sms": 132}\n')
        assert tune.main(["fit", str(path), "--check"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err == f"tune: fit: {path}: expected a file of `tune.py measure`, got another one\n"
    header = tmp_path / "header.h"
    header.write_text("")
    assert tune.main(["fit", "--header", str(header), "--check"]) == 2
    assert capsys.readouterr().err == "tune: fit: --header: expected a table with kBits16Tactics, got none\n"


@pytest.mark.parametrize("changes", [{"us": 0}, {"us": "1"}, {"format": "int3"}, {"tokens": None}], ids=str)
def test_fit_refuses_lines_that_are_no_times(changes: dict[str, object], tmp_path) -> None:
    line = {"format": "bf16", "num_experts": 8, "hidden_size": 2048, "intermediate_size": 8192, "top_k": 2, "tokens": 1}
    with tune.ResultFile(tmp_path / "times.jsonl", {"num_sms": NUM_SMS}) as results:
        results.write_record({**line, "tactic": "split64", "us": 1.0, **changes})
    with pytest.raises(tune._run.Refused, match="expected a time of a layer's tactic, got "):
        tune.read_points(tmp_path / "times.jsonl")


@pytest.mark.parametrize(
    "argv, line",
    [
        (["fit", "/nonexistent"], "tune: fit: file: expected a file of `tune.py measure`, got /nonexistent: "),
        (["fit", "--header", "/nonexistent"], "tune: fit: --header: expected the table, got /nonexistent: "),
    ],
)
def test_files_that_are_not_there(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(argv) == 2
    assert capsys.readouterr().err == f"{line}No such file or directory\n"
