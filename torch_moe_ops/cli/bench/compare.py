"""Set result files side by side: ours against the best correct point of the baselines, and the geometric mean."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from .._arguments import not_negative
from .._run import WRITABLE, Refused, opened


class Key(NamedTuple):
    """What two points must share to be compared."""

    case: str
    format: str
    tokens: int
    routing: str
    what: str

    @classmethod
    def of(cls, point: dict) -> Key:
        """Files written before there was a choice hold neither routing nor, some of them, what."""
        routing, what = point.get("routing", "uniform"), point.get("what", "fused_moe")
        try:
            key = cls(point["case"], point["format"], point["tokens"], routing, what)
        except KeyError as error:
            raise Refused(f"expected points with case, format and tokens, got one without {error}: {point}") from None
        if not all(isinstance(value, int if name == "tokens" else str) for name, value in key._asdict().items()):
            raise Refused(f"expected points with names and a number of tokens, got {point}")
        for name in ("us", "floor_us"):
            number = point.get(name) or 1.0  # a failed point has none
            if not isinstance(number, int | float) or number <= 0:
                raise Refused(f"expected points whose {name} is a positive number, got {point}")
        return key


@dataclass(frozen=True)
class Comparison:
    case: str
    format: str
    tokens: int
    routing: str
    what: str
    us: float
    best_us: float
    best: str
    speedup: float  # best_us / us
    over_floor: float | None  # us / floor_us

    @property
    def key(self) -> Key:
        return Key(self.case, self.format, self.tokens, self.routing, self.what)

    def __str__(self) -> str:
        over_floor = f"{self.over_floor:.2f}" if self.over_floor else "-"
        return (
            f"{self.case:<13}{self.format:<10}{self.tokens:>7}  {self.routing:<9}{self.what:<17}{self.us:>10.1f}"
            f"{self.best_us:>10.1f}{self.speedup:>9.2f}{over_floor:>9}  {self.best}"
        )


HEADER = (
    f"{'case':<13}{'format':<10}{'tokens':>7}  {'routing':<9}{'what':<17}{'us':>10}{'best us':>10}{'speedup':>9}"
    f"{'x floor':>9}  best baseline"
)


def add_parser(reports: argparse._SubParsersAction) -> None:
    parser = reports.add_parser("compare", help=__doc__, description=__doc__)
    parser.add_argument("ours", type=Path, help="a result file of this package")
    parser.add_argument("--baseline", type=Path, nargs="+", required=True, metavar="FILE", help="result files")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the speedups (needs matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON Lines")
    parser.add_argument(
        "--least",
        type=not_negative,
        metavar="SPEEDUP",
        help="point out what has less than this speedup; exit status 1 if anything has",
    )
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    from .results import read_results

    with opened("ours", "a result file"):
        _, ours = read_results(args.ours)
    with opened("--baseline", "result files"):
        baseline = [
            {"peer": header.get("name", path.stem), **point}
            for path in args.baseline
            for header, points in [read_results(path)]
            for point in points
        ]
    rows = compare(ours, baseline)
    if not rows:
        raise Refused(f"expected points that {args.ours} and a baseline share, got none")
    if args.json:
        with opened("--json", WRITABLE):
            args.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    if args.plot:
        with opened("--plot", WRITABLE):
            plot(rows, args.plot)
    print(HEADER, *rows, sep="\n")
    for what, routing in dict.fromkeys((row.what, row.routing) for row in rows):
        kind = [row for row in rows if (row.what, row.routing) == (what, routing)]
        start = f"{what}, {routing} routing: geometric mean of"
        print(f"{start} {len(kind)} speedups: {geomean(row.speedup for row in kind):.3f}")
        over_floor = [row.over_floor for row in kind if row.over_floor]
        if over_floor:
            print(f"{start} {len(over_floor)} times over the floor: {geomean(over_floor):.3f}")
    lacking = missing(ours, baseline)
    for key in lacking:
        print(f"not in {args.ours}: {' '.join(map(str, key))}")
    slower = [row for row in rows if args.least is not None and row.speedup < args.least]
    for row in slower:
        print(f"below {args.least:g}: {' '.join(map(str, row.key))} {row.speedup:.3f}")
    return 1 if slower or (lacking and args.least is not None) else 0


def compare(ours: Iterable[dict], baseline: Iterable[dict]) -> list[Comparison]:
    """The points that both sides have, in the order of ours."""
    best = best_points(baseline)
    rows = []
    for key, point in best_points(ours).items():
        if key not in best:
            continue
        peer, us, floor = best[key], point["us"], point.get("floor_us")
        rows.append(Comparison(*key, us, peer["us"], peer["peer"], peer["us"] / us, us / floor if floor else None))
    return rows


def missing(ours: Iterable[dict], baseline: Iterable[dict]) -> list[Key]:
    """The baselines' points that ours lack or have wrong, of the kinds that ours have at all."""
    have = best_points(ours)
    kinds = {(key.what, key.routing) for key in map(Key.of, ours)}
    return sorted(key for key in best_points(baseline) if key not in have and (key.what, key.routing) in kinds)


def best_points(points: Iterable[dict]) -> dict[Key, dict]:
    """The fastest correct point of each key."""
    best: dict[Key, dict] = {}
    for point in points:
        key = Key.of(point)
        if point.get("ok") and point.get("us") and (key not in best or point["us"] < best[key]["us"]):
            best[key] = point
    return best


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def plot(rows: list[Comparison], path: Path) -> None:
    """Speedup over tokens: a panel per (what, routing) and format, in it a line per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys((row.what, row.routing) for row in rows))
    formats = list(dict.fromkeys(row.format for row in rows))
    size = (6 * len(formats), 4 * len(kinds))
    figure, axes = pyplot.subplots(len(kinds), len(formats), figsize=size, sharey="row", squeeze=False)
    for (what, routing), line_of_axes in zip(kinds, axes, strict=True):
        for format, axis in zip(formats, line_of_axes, strict=True):
            panel = [row for row in rows if (row.what, row.routing, row.format) == (what, routing, format)]
            for case in dict.fromkeys(row.case for row in panel):
                line = [row for row in panel if row.case == case]
                axis.plot([row.tokens for row in line], [row.speedup for row in line], marker="o", label=case)
            axis.axhline(1.0, color="black", linewidth=0.8)
            title = f"{what}, {format}, {routing} routing"
            axis.set(xscale="log", title=title, xlabel="tokens", ylabel="best baseline time / ours")
            axis.grid(alpha=0.3)
            if panel:
                axis.legend(fontsize=8)
    figure.tight_layout()
    if path.suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise Refused(f"--plot: expected the name of a picture, such as x.png, got {path}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
