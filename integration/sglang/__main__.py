"""`python -m torch_moe_ops.integration.sglang check MODEL_DIR`: see check.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import check


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torch_moe_ops.integration.sglang", description="SGLang adapter.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    subparser = commands.add_parser("check", help=check.__doc__.partition("\n")[0], description=check.__doc__)
    check.add_arguments(subparser)
    args, ignored = parser.parse_known_args(argv)
    if ignored:
        print(f"not looked at: {' '.join(ignored)}")
    return check.main(args)


if __name__ == "__main__":
    sys.exit(main())
