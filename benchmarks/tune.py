#!/usr/bin/env python3
"""Fits the thresholds of the SM90 tactics, csrc/grouped_gemm/tactics_table_sm90.h, to times of made-up layers.

    python benchmarks/tune.py measure --json FILE     on a GPU: times every tactic that could be the best one
                      (--cases dsv3_tp8,qwen30b: of the benchmark's layers, to look at)
    python benchmarks/tune.py fit FILE                anywhere: shows the fit and writes the table
    python benchmarks/tune.py fit FILE --check        writes nothing; exit status 1 if that would change the table

The rule (`choose_tactic`, the same as in tactics_sm90.h) knows no layer. Its thresholds are ratios, such as rows an
expert and tiles an SM, so a layer that nobody has measured is treated like a measured one of the same ratios. The
measured layers are none of the benchmark's.

The fit starts from the table and changes one threshold at a time, the one that helps the most, for as long as that
lowers the geometric mean of time(chosen) / time(best) by more than 0.1 %: less than that is noise. So a table that was
fitted is a fixed point.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from torch_moe_ops.cli import _layer, _run
from torch_moe_ops.cli._arguments import names_of, numbers
from torch_moe_ops.cli.bench.measure import time_calls
from torch_moe_ops.cli.bench.results import ResultFile, environment, read_results
from torch_moe_ops.experts import Experts

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/h200_tactics.jsonl"
TABLE = ROOT / "csrc/grouped_gemm/tactics_table_sm90.h"

ELEMENTS = ("bits16", "float8", "packed", "packed_float8")  # as in C++
# What is measured, a format or weights x activations -> which table it decides.
FORMATS = {"bf16": "bits16", "fp8_block": "float8", "nvfp4": "packed", "mxfp4 x fp8_block": "packed_float8"}
TILES = {  # tokens
    "split32": 32,
    "split64": 32,
    "split128": 32,
    "split256": 32,
    "gated32": 32,
    "gated64": 64,
    "gated128": 128,
    "gathered128": 128,
}
ALONE = "+gemm2"
MAX_SPLIT_SLOTS = 384
LAYERS = (  # experts, hidden, intermediate, top_k
    (64, 4096, 512, 4),
    (16, 3072, 4096, 2),
    (192, 2560, 640, 6),
    (48, 5120, 2048, 8),
    (8, 2048, 8192, 2),
    (256, 3584, 256, 8),
    (128, 7168, 384, 8),
    (12, 3584, 14336, 2),
    (8, 6144, 16384, 2),
    (6, 5120, 12288, 3),
    (160, 5120, 192, 6),
    (64, 2048, 384, 6),
    (384, 7168, 128, 8),
    (128, 5120, 256, 8),
)
TOKENS = (1, 4, 8, 16, 48, 160, 512, 1536, 5120)
# The benchmark's layers, by name: the fit never sees them.
CASES = {
    name: (case.num_experts, case.hidden_size, case.intermediate_size, case.top_k)
    for name, case in _layer.CASES.items()
    if case.num_experts == case.num_router_experts
}
HYSTERESIS = 1.001  # timings repeat to 1 %, so that the mean over 100 points is known to about 0.1 %
UNMEASURED = 2.0  # times the best: what a tactic counts that was not measured because it is hopeless


# ---- the rule --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What is known of a layer before it runs (LayerFacts in C++)."""

    elements: str
    num_rows: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    num_sms: int
    can_gather: bool = True
    can_split: bool = True
    local_share: float = 1.0
    rounds_acts: bool = False

    @property
    def expected_rows(self) -> float:
        return self.num_rows * self.local_share

    @property
    def rows_an_expert(self) -> float:
        return self.num_rows / self.num_experts

    @property
    def may_split(self) -> bool:
        return self.can_split and self.num_rows <= MAX_SPLIT_SLOTS


def threshold(comment: str, *values: float) -> float:
    """A field: its comment in C++, and the values that the fit tries."""
    return field(metadata={"comment": comment, "values": values})


@dataclass(frozen=True)
class Constants:
    """The thresholds of one kind of elements (TacticConstants in C++)."""

    split_rows: float = threshold("split up to this many rows an expert,", 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8)
    split_rounds: float = threshold(
        "and if the GEMM with fewer tiles of 256 rows has fewer than this many an SM;",
        *(0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 6, 8),
    )
    split64_rounds: float = threshold(
        "of 64 rows if GEMM1 has fewer than this many tiles of 128 rows an SM", 0, 0.25, 0.4, 0.5, 0.75, 1, 1.5, 2, 4
    )
    split32_rounds: float = threshold(
        "not packed: of 32 rows in GEMM1 if it has fewer than this many such tiles",
        *(0, 0.125, 0.25, 0.4, 0.5, 0.75, 1, 1.5, 2),
    )
    split256_cost: float = threshold(
        "packed: of 256 rows if a round of those, at this cost of one of 128 rows, saves rounds of GEMM1;",
        *(1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9),
    )
    gated32_rows: float = threshold("packed: gated32 up to this many rows an expert,", 2, 4, 8, 12, 16, 20, 24)
    gated32_rounds: float = threshold(
        "and if the GEMM with fewer tiles of 256 rows has at least this many an SM",
        *(1, 1.5, 1.75, 2, 2.25, 2.5, 3, 4, 6, 8, math.inf),
    )
    gated64_rows: float = threshold("gated64 up to this many rows an expert", 12, 16, 24, 32, 40, 48, 56, 64, 80, 96)
    gathered_row_tiles: float = threshold(
        "then tokens are gathered up to this many row tiles of GEMM1", 0, 1, 2, 4, 5, 8, 16, 32, 64, math.inf
    )
    alone_rounds: float = threshold("gated: GEMM2 alone with fewer tiles an SM than this,", 0, 1, 2, 3, 4, 6, 8, 12)
    alone_k_blocks: float = threshold("if its K has at least this many blocks of 128", 8, 16, 24, 32, 48, 64, 96)
    alone_rows: float = threshold("and from this many rows an expert on", 0, 4, 8, 16, 32, 48, 64, 96)


def choose_tiles(facts: Facts, constants: Constants) -> str:
    hit, gemm1 = expected_hit(facts), 2 * facts.intermediate_size

    def tiles(weight_rows: int, tile_rows: int) -> float:
        return hit * math.ceil(weight_rows / tile_rows)

    def rows_an_expert_up_to(rows: float) -> bool:
        return facts.expected_rows <= rows * facts.num_experts

    fewest = min(tiles(gemm1, 256), tiles(facts.hidden_size, 256))
    if (
        facts.may_split
        and rows_an_expert_up_to(constants.split_rows)
        and fewest < constants.split_rounds * facts.num_sms
    ):
        if not is_packed(facts) and tiles(gemm1, 128) < constants.split32_rounds * facts.num_sms:
            return "split32"
        if tiles(gemm1, 128) < constants.split64_rounds * facts.num_sms:
            return "split64"

        def split_rounds(tile_rows: int) -> float:
            return math.ceil(2 * tiles(facts.intermediate_size, tile_rows) / facts.num_sms)

        saves = constants.split256_cost * split_rounds(256) < split_rounds(128)
        return "split256" if facts.elements == "packed" and saves else "split128"
    if (
        facts.elements == "packed"
        and rows_an_expert_up_to(constants.gated32_rows)
        and fewest >= constants.gated32_rounds * facts.num_sms
    ):
        return "gated32"
    if rows_an_expert_up_to(constants.gated64_rows) or most_tokens(facts) == 64:
        return "gated64"
    gathers = math.ceil(facts.intermediate_size / 128) <= constants.gathered_row_tiles
    return "gathered128" if facts.can_gather and gathers else "gated128"


def expected_hit(facts: Facts) -> float:
    """How many experts are hit if every row draws one at random."""
    return facts.num_experts * (1 - math.exp(-facts.expected_rows / facts.num_experts))


def gemm2_tiles(facts: Facts, tiles: str) -> float:
    hit = expected_hit(facts)
    token_tiles = hit * math.ceil(facts.expected_rows / hit / TILES[tiles]) if hit > 0 else 0
    return token_tiles * math.ceil(facts.hidden_size / 256)


def choose_tactic(facts: Facts, constants: Constants) -> str:
    tiles = choose_tiles(facts, constants)
    alone = (
        not tiles.startswith("split")
        and not (is_packed(facts) and tiles == "gated64")
        and gemm2_tiles(facts, tiles) < constants.alone_rounds * facts.num_sms
        and facts.intermediate_size >= constants.alone_k_blocks * 128
        and facts.expected_rows >= constants.alone_rows * facts.num_experts
    )
    return tiles + ALONE if alone else tiles


def is_packed(facts: Facts) -> bool:
    return facts.elements.startswith("packed")


def most_tokens(facts: Facts) -> int:
    """Of a tile."""
    return 64 if facts.elements == "packed_float8" or facts.rounds_acts else 128


def possible_tiles(facts: Facts) -> dict[str, int]:
    tiles = {
        name: tokens
        for name, tokens in TILES.items()
        if tokens <= most_tokens(facts) and (facts.may_split or not name.startswith("split"))
    }
    impossible = {"split32"} if is_packed(facts) else set()
    if facts.elements != "packed":
        impossible |= {"split256", "gated32"}
    return {name: tiles[name] for name in tiles if name not in impossible}


def candidates(facts: Facts) -> list[str]:
    """The tactics worth timing. The others are hopeless: an expert has several token tiles of small ones, or no tokens
    for large ones; GEMM2 alone costs a launch, and gains nothing where tiles are many or short."""
    tactics, most = [], most_tokens(facts)
    for tiles, tokens in possible_tiles(facts).items():
        too_small = tokens < most and facts.rows_an_expert > 1.5 * tokens
        too_large = tokens == 128 and facts.rows_an_expert < 8
        if too_small or too_large:
            continue
        tactics.append(tiles)
        few = gemm2_tiles(facts, tiles) < 12 * facts.num_sms and facts.intermediate_size >= 1024
        if few and not tiles.startswith("split"):
            tactics.append(tiles + ALONE)
    return tactics


# ---- the table -------------------------------------------------------------------------------------------------------

HEADER = """\
// Written by benchmarks/tune.py from benchmarks/results/h200_tactics.jsonl; do not edit.
#pragma once
#include <limits>

namespace moe::sm90 {{

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Where choose_tactic changes its mind. "Tiles an SM" are those of the experts that are likely to be hit.
struct TacticConstants {{
{fields}
}};

{tables}

}}  // namespace moe::sm90
"""


def table_text(table: dict[str, Constants]) -> str:
    width = max(len(f.name) for f in fields(Constants))
    declared = (f"  double {f.name + ';':<{width + 1}}  // {f.metadata['comment']}" for f in fields(Constants))
    return HEADER.format(fields="\n".join(declared), tables="\n".join(map(_table_line, table, table.values())))


def _table_line(elements: str, constants: Constants) -> str:
    values = ", ".join(f".{f.name} = {_number(getattr(constants, f.name))}" for f in fields(Constants))
    head, tail = values.split(", .gated64_rows", 1)
    return f"constexpr TacticConstants {_name(elements)} = {{\n    {head},\n    .gated64_rows{tail}}};"


def _name(elements: str) -> str:
    return f"k{elements.title().replace('_', '')}Tactics"


def _number(value: float) -> str:
    return "kInfinity" if value == math.inf else f"{value:g}"


def read_table(text: str) -> dict[str, Constants]:
    """What `table_text` has written."""
    table = {}
    for elements in ELEMENTS:
        body = "".join(re.findall(rf"TacticConstants {_name(elements)} = {{(.*?)}};", text, re.DOTALL))
        if not body:
            raise _run.Refused(f"fit: --header: expected a table with {_name(elements)}, got none")
        values = re.findall(r"\.(\w+) = (\S+?)(?:,|$)", body)
        table[elements] = Constants(**{name: math.inf if x == "kInfinity" else float(x) for name, x in values})
    return table


# ---- the fit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """One layer at one number of tokens: what each tactic takes, in us."""

    what: str
    facts: Facts
    us: dict[str, float]

    def regret(self, constants: Constants) -> float:
        """time(chosen) / time(best)"""
        best = min(self.us.values())
        return self.us.get(choose_tactic(self.facts, constants), UNMEASURED * best) / best


def regret(points: Sequence[Timed], constants: Constants) -> float:
    return statistics.geometric_mean(point.regret(constants) for point in points)


def neighbours(elements: str, constants: Constants) -> Iterator[Constants]:
    """Every other value of one threshold; those next to the present one first."""
    for f in fields(Constants):
        if f.name.startswith(("split256", "gated32")) and elements != "packed":
            continue
        if f.name.startswith("split32") and elements.startswith("packed"):
            continue
        for value in nearest_first(f.metadata["values"], getattr(constants, f.name)):
            yield replace(constants, **{f.name: value})


def nearest_first(values: Sequence[float], now: float) -> list[float]:
    """The values other than the present one, by the number of steps from there."""
    order = sorted({*values, now})
    return sorted(order, key=lambda value: abs(order.index(value) - order.index(now)))[1:]


def fit(elements: str, points: Sequence[Timed], start: Constants) -> Constants:
    constants, now = start, regret(points, start)
    while True:
        # The first of equally good ones, so the smallest change: 12 digits are the same.
        best = min(neighbours(elements, constants), key=lambda other: round(regret(points, other), 12))
        least = regret(points, best)
        if now / least <= HYSTERESIS:
            return constants
        constants, now = best, least


def report(elements: str, points: Sequence[Timed], current: Constants, fitted: Constants) -> None:
    before, after = regret(points, current), regret(points, fitted)
    print(f"{elements}: {len(points)} points; time(chosen) / time(best), geometric mean: {before:.4f} -> {after:.4f}")
    for f in fields(Constants):
        old, new = getattr(current, f.name), getattr(fitted, f.name)
        if old != new:
            print(f"  {f.name}: {old:g} -> {new:g}")
    for point in sorted(points, key=lambda point: -point.regret(fitted))[:5]:
        chosen, best = choose_tactic(point.facts, fitted), min(point.us, key=point.us.__getitem__)
        times = f"{chosen} {point.us.get(chosen, math.nan):.1f} us, {best} {point.us[best]:.1f}"
        print(f"  {point.regret(fitted):.3f}  {point.what}: {times}")


def read_points(path: Path) -> dict[str, list[Timed]]:
    """By elements, in the order of the file."""
    with _run.opened("fit: file", "a file of `tune.py measure`"):
        header, lines = read_results(path)
    if (
        type(header.get("num_sms")) is not int
        or header["num_sms"] < 1
        or not lines
        or not all("tactic" in line for line in lines)
    ):
        raise _run.Refused(f"fit: {path}: expected a file of `tune.py measure`, got another one")
    points: dict[str, dict[str, Timed]] = {elements: {} for elements in ELEMENTS}
    counts = ("num_experts", "hidden_size", "intermediate_size", "top_k", "tokens")
    for line in lines:
        us = line.get("us")
        known = line.get("format") in FORMATS and all(type(line.get(name)) is int for name in counts)
        if not known or not isinstance(us, int | float) or us <= 0:
            raise _run.Refused(f"fit: {path}: expected a time of a layer's tactic, got {line}")
        sizes = [line[name] for name in counts[:3]]
        elements = FORMATS[line["format"]]
        for name, case in CASES.items():
            if case == (*sizes, line["top_k"]):
                raise SystemExit(f"tune: fit: {path}: expected layers made up for it, got the benchmark's {name}")
        facts = Facts(elements, line["tokens"] * line["top_k"], *sizes, header["num_sms"])
        what = f"{line['format']} E{sizes[0]} H{sizes[1]} I{sizes[2]} top{line['top_k']}, {line['tokens']} tokens"
        points[elements].setdefault(what, Timed(what, facts, {})).us[line["tactic"]] = us
    return {elements: list(timed.values()) for elements, timed in points.items()}


def run_fit(args: argparse.Namespace) -> int:
    with _run.opened("fit: --header", "the table"):
        current = read_table(args.header.read_text())
    points = read_points(args.file)
    fitted = {}
    for elements in ELEMENTS:
        fitted[elements] = current[elements]
        if points[elements]:
            fitted[elements] = fit(elements, points[elements], current[elements])
            report(elements, points[elements], current[elements], fitted[elements])
    text = table_text(fitted)
    if text == args.header.read_text():
        print(f"{args.header}: unchanged")
        return 0
    if not args.check:
        args.header.write_text(text)
    print(f"{args.header}: {'not what the fit gives' if args.check else 'written'}")
    return int(args.check)


# ---- measuring -------------------------------------------------------------------------------------------------------


class Tuner:
    """Times the tactics of one layer after another, and writes a line for each."""

    def __init__(self, path: Path, replay_ms: float, num_sms: int, device: str = "cuda") -> None:
        self.replay_ms, self.num_sms, self.device, self.start = replay_ms, num_sms, device, time.perf_counter()
        self.table = read_table(TABLE.read_text())
        self.file = ResultFile(path, {**environment(), "num_sms": num_sms})

    def layer(self, format: str, sizes: tuple[int, int, int, int], all_tokens: Sequence[int]) -> None:
        num_experts, hidden_size, intermediate_size, top_k = sizes
        case = _layer.Case("tune", num_experts, num_experts, hidden_size, intermediate_size, top_k)
        weights, _, acts = format.partition(" x ")
        experts = _layer.make_experts(case, weights, "bf16" if FORMATS[format] == "packed" else acts, self.device)
        for tokens in all_tokens:
            facts = Facts(FORMATS[format], tokens * top_k, num_experts, hidden_size, intermediate_size, self.num_sms)
            us = self.point(case, experts, tokens, candidates(facts))
            chosen = choose_tactic(facts, self.table[facts.elements])
            what = dict(format=format, num_experts=num_experts, hidden_size=hidden_size)
            what |= dict(intermediate_size=intermediate_size, top_k=top_k, tokens=tokens)
            for tactic, time_us in us.items():
                self.file.write_record({**what, "tactic": tactic, "us": round(time_us, 2), "chosen": tactic == chosen})
            best = min(us, key=us.__getitem__)
            print(
                f"{time.perf_counter() - self.start:6.1f} s  {format:<18}{str(sizes):<24}{tokens:>5} tokens  "
                f"{chosen} {us.get(chosen, math.nan):.1f} us, best of {len(us)}: {best} {us[best]:.1f}",
                flush=True,
            )

    def point(self, case: _layer.Case, experts: Experts, tokens: int, tactics: Sequence[str]) -> dict[str, float]:
        """us of each tactic. All give the bits that the op gives by itself, or this fails."""
        generator = torch.Generator(device=self.device).manual_seed(tokens)
        calls = 8 if tokens <= 16 else 4 if tokens <= 160 else 2
        inputs = [_layer.make_inputs(case, tokens, generator, index) for index in range(calls)]
        options, us = experts.options(), {}

        def call(tactic: str, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
            op = torch.ops.moe.fused_moe_with_tactic
            return op(tactic, x, experts.w13, experts.w2, topk_weights, topk_ids, **options)

        expected = [call("", *arguments) for arguments in inputs]
        time_calls(call, [("", *arguments) for arguments in inputs], replay_ms=self.replay_ms)  # the clocks rise
        for tactic in tactics:
            with_tactic = [(tactic, *arguments) for arguments in inputs]
            us[tactic], _, outputs = time_calls(call, with_tactic, replay_ms=self.replay_ms)
            if not all(map(torch.equal, outputs, expected)):
                raise SystemExit(f"tune: {experts.format}, {case}, {tokens} tokens: {tactic} gives other bits")
        return us


def run_measure(args: argparse.Namespace) -> int:
    got = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if got == "none" or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit(f"tune: measure: expected a GPU of compute capability 9.0, got {got}")
    layers = [CASES[name] for name in args.cases] if args.cases else LAYERS
    tuner = Tuner(args.json, args.replay_ms, torch.cuda.get_device_properties(0).multi_processor_count)
    with tuner.file:
        for format, sizes in product(args.formats, layers):
            tuner.layer(format, sizes, args.tokens)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    measure = commands.add_parser("measure", help="time the tactics on this GPU")
    measure.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the times go, JSON Lines")
    measure.add_argument(
        "--formats", type=names_of(FORMATS), default=",".join(FORMATS), metavar="NAMES", help="default: %(default)s"
    )
    measure.add_argument(
        "--cases",
        type=names_of(CASES),
        metavar="NAMES",
        help=f"the benchmark's layers instead, to look at, which fit refuses: of {','.join(CASES)}",
    )
    measure.add_argument(
        "--tokens", type=numbers, default=",".join(map(str, TOKENS)), metavar="NUMBERS", help="default: %(default)s"
    )
    measure.add_argument("--replay-ms", type=float, default=30.0, help="for each tactic; default: %(default)s")
    measure.set_defaults(run=run_measure)
    fitting = commands.add_parser("fit", help="fit the table to measured times")
    fitting.add_argument("file", type=Path, nargs="?", default=RESULTS, metavar="FILE", help="of measure")
    fitting.add_argument("--header", type=Path, default=TABLE, metavar="PATH", help="the table: start and result")
    fitting.add_argument("--check", action="store_true", help="write nothing, exit status 1 if that would change it")
    fitting.set_defaults(run=run_fit)
    args = parser.parse_args(argv)
    return _run.run("tune", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
