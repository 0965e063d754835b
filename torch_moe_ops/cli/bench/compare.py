"""Set result files side by side: ours against the best correct point of the baselines, and the geometric mean."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

Key = tuple[str, str, int]  # case, format, tokens


@dataclass(frozen=True)
class Comparison:
    case: str
    format: str
    tokens: int
    us: float
    best_us: float
    best: str
    speedup: float  # best_us / us
    over_floor: float | None  # us / floor_us

    def __str__(self) -> str:
        over_floor = f"{self.over_floor:.2f}" if self.over_floor else "-"
        return (
            f"{self.case:<13}{self.format:<10}{self.tokens:>7}{self.us:>10.1f}{self.best_us:>10.1f}{self.speedup:>9.2f}"
            f"{over_floor:>9}  {self.best}"
        )


HEADER = f"{'case':<13}{'format':<10}{'tokens':>7}{'us':>10}{'best us':>10}{'speedup':>9}{'x floor':>9}  best baseline"


def add_parser(reports: argparse._SubParsersAction) -> None:
    parser = reports.add_parser("compare", help=__doc__, description=__doc__)
    parser.add_argument("ours", type=Path, help="a result file of this package")
    parser.add_argument("--baseline", type=Path, nargs="+", required=True, metavar="FILE", help="result files")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the speedups (needs matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON Lines")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    from .results import read_results

    _, ours = read_results(args.ours)
    baseline = [
        {"peer": header.get("name", path.stem), **point}
        for path in args.baseline
        for header, points in [read_results(path)]
        for point in points
    ]
    rows = compare(ours, baseline)
    print(HEADER, *rows, sep="\n")
    if rows:
        print(f"geometric mean of {len(rows)} speedups: {geomean(row.speedup for row in rows):.3f}")
        over_floor = [row.over_floor for row in rows if row.over_floor]
        if over_floor:
            print(f"geometric mean of {len(over_floor)} times over the floor: {geomean(over_floor):.3f}")
    missing = sorted(set(best_points(baseline)) - {(row.case, row.format, row.tokens) for row in rows})
    for case, format, tokens in missing:
        print(f"not in {args.ours}: {case} {format} {tokens}")
    if args.json:
        args.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    if args.plot:
        plot(rows, args.plot)
    return 0 if rows else 1


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


def best_points(points: Iterable[dict]) -> dict[Key, dict]:
    """The fastest correct fused_moe point of each key."""
    best: dict[Key, dict] = {}
    for point in points:
        key = (point["case"], point["format"], point["tokens"])
        usable = point.get("what", "fused_moe") == "fused_moe" and point.get("ok") and point.get("us")
        if usable and (key not in best or point["us"] < best[key]["us"]):
            best[key] = point
    return best


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def plot(rows: list[Comparison], path: Path) -> None:
    """One line a (case, format): speedup over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[tuple[str, str], list[Comparison]] = {}
    for row in rows:
        lines.setdefault((row.case, row.format), []).append(row)
    formats = list(dict.fromkeys(row.format for row in rows))
    figure, axes = pyplot.subplots(1, len(formats), figsize=(6 * len(formats), 4), sharey=True, squeeze=False)
    for axis, format in zip(axes[0], formats, strict=True):
        for (case, line_format), line in lines.items():
            if line_format == format:
                axis.plot([row.tokens for row in line], [row.speedup for row in line], marker="o", label=case)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", title=format, xlabel="tokens", ylabel="best baseline time / ours")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
