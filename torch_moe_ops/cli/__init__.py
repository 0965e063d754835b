"""The command line: `python -m torch_moe_ops COMMAND`, where each public module of this package is one.

A command module has a docstring (its first line is the help text), add_arguments(parser) and main(args) -> exit status.
"""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import Sequence
from importlib import import_module

from . import _run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torch_moe_ops", description="Mixture-of-Experts ops for PyTorch.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")):
        command = import_module(f"{__name__}.{name}")
        summary, _, description = command.__doc__.partition("\n")
        subparser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n{description}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.main, name=name)
    args = parser.parse_args(argv)
    return _run.run(args.name, lambda: args.run(args))
