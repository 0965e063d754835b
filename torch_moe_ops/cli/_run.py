"""How a command ends: its exit status, and one line instead of a traceback for what its user can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class Refused(ValueError):
    """One line: what was expected, and what came."""


def run(name: str, command: Callable[[], int | None]) -> int:
    """Exit status 2 for a file that cannot be used, 130 after Ctrl-C, 141 if nobody reads the output any more."""
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except (OSError, Refused) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
