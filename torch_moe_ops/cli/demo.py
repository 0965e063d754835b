"""Run a small MoE layer in every format this device takes, and check it.

A line per format: the backend that runs, the error against a float32 loop over the dequantised weights, and whether the
compiled layer and (on a GPU) a CUDA-graph replay with other routings in the same buffers give the eager result bit for
bit. On a GPU the layer of one DeepSeek-V3 rank (expert parallel 8) runs too. Exit status 1: something is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass

import torch

from ..backends import explain_choices
from ..experts import Experts
from ..formats import FORMATS
from . import _layer

SMALL = _layer.Case("small", 8, 16, 256, 192, 2)
SMALL_TOKENS, LARGE_TOKENS = 33, 64


@dataclass(frozen=True)
class Row:
    """What one format does on one layer; `compiled` and `graph` say whether the bits equal the eager ones."""

    layer: str
    format: str
    backend: str | None
    error: float | None = None
    tolerance: float | None = None
    compiled: bool | None = None  # None: --no-compile
    graph: bool | None = None  # None: no graphs on this device
    note: str = ""  # why it did not run, how it failed, or with which activations it ran
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """A format without a backend on this device is no mistake; everything that ran must be right."""
        if self.backend is None:
            return True
        right = self.error is not None and self.error <= self.tolerance
        return right and self.compiled is not False and self.graph is not False

    def __str__(self) -> str:
        start = f"{self.layer:<10}{self.format:<16}{self.backend or '-':<14}"
        if self.error is None:
            return f"{start}{self.note}"
        same = ["-" if value is None else "same" if value else "DIFFERS" for value in (self.compiled, self.graph)]
        end = f"{'ok' if self.ok else 'WRONG'}  {self.note}".rstrip()
        return f"{start}{self.error:>9.5f}{self.tolerance:>11.5f}{same[0]:>10}{same[1]:>9}  {end}"


HEADER = f"{'layer':<10}{'format':<16}{'backend':<14}{'error':>9}{'tolerance':>11}{'compiled':>10}{'graph':>9}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, metavar="FORMAT")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        print("demo: --device: expected cpu where there is no CUDA GPU, got cuda", file=sys.stderr)
        return 2
    layers = [(SMALL, SMALL_TOKENS, args.formats)]
    if args.device == "cuda" and "fp8_block" in args.formats:
        layers.append((_layer.CASES["dsv3_ep8"], LARGE_TOKENS, ["fp8_block"]))
    rows = []
    if not args.json:
        print(HEADER, flush=True)
    for case, num_tokens, formats in layers:
        for format in formats:
            progress(f"{case.name} {format} ...")
            rows.append(run(case, num_tokens, format, args.device, not args.no_compile))
            progress("")
            if not args.json:
                print(rows[-1], flush=True)
    if args.json:
        errors = ({"error": row.error if math.isfinite(row.error) else None} for row in rows)  # JSON knows no NaN
        dicts = [asdict(row) | error | {"ok": row.ok} for row, error in zip(rows, errors, strict=True)]
        print(json.dumps(dicts, indent=2, allow_nan=False))
    return 0 if all(row.ok for row in rows) else 1


def progress(text: str) -> None:
    """A line that the next one overwrites; only for people."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def run(case: _layer.Case, num_tokens: int, format: str, device: str, compiled: bool) -> Row:
    explanation = explain_choices(
        format,
        ("", "bf16") if FORMATS[format].has_scale else ("",),  # in the weights' format, else not quantised
        device=device,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_experts=case.num_experts,
        top_k=case.top_k,
    )[-1]
    if explanation.backend is None:
        return Row(case.name, format, None, note=f"no backend on this {device} takes it (see: explain)")
    started = time.monotonic()
    try:
        with torch.no_grad():
            checks = check(case, num_tokens, format, explanation.problem.act_format, device, compiled)
    except Exception as error:  # one broken format must not hide the others; the row fails
        note = f"FAILED: {' '.join(str(error).split())[:200]}"
        return Row(case.name, format, explanation.backend, note=note, seconds=time.monotonic() - started)
    note = f"{explanation.problem.act_format} activations" if explanation.problem.act_format else ""
    return Row(
        case.name, format, explanation.backend, **checks, note=note, seconds=round(time.monotonic() - started, 2)
    )


def check(
    case: _layer.Case, num_tokens: int, format: str, act_format: str, device: str, compiled: bool
) -> dict[str, object]:
    experts = _layer.make_experts(case, format, act_format, device)
    generator = torch.Generator(device=device).manual_seed(2)
    dtype = _layer.input_dtype(experts)
    inputs = [_layer.make_inputs(case, num_tokens, generator, index, dtype) for index in range(2)]
    eager = [experts(*each) for each in inputs]
    errors = []
    for each, output in zip(inputs, eager, strict=True):
        rows, expected = _layer.reference(experts, each)
        errors.append(_layer.relative_error(output[rows], expected))
    return {
        "error": max(errors),
        "tolerance": _layer.tolerance(experts),
        "compiled": compiled_matches(experts, inputs, eager) if compiled else None,
        "graph": replay_matches(experts, inputs, eager) if device == "cuda" else None,
    }


def compiled_matches(experts: Experts, inputs: list, eager: list) -> bool:
    layer = torch.compile(experts, fullgraph=True, dynamic=True)
    return all(torch.equal(layer(*each), expected) for each, expected in zip(inputs, eager, strict=True))


def replay_matches(experts: Experts, inputs: list, eager: list) -> bool:
    """Captures the layer on copies of the first inputs, then replays it with each of the inputs in the same buffers."""
    buffers = [tensor.clone() for tensor in inputs[0]]
    experts(*buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = experts(*buffers)
    same = True
    for each, expected in zip(reversed(inputs), reversed(eager), strict=True):
        for buffer, tensor in zip(buffers, each, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        same &= torch.equal(output, expected)
    return same
