"""How a command ends: its exit status, and one line instead of a traceback for what its user can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WRITABLE = "a file that can be written"


class Refused(ValueError):
    """One line: what was expected, and what came."""


@contextmanager
def opened(argument: str, expected: str) -> Iterator[None]:
    """A file that cannot be opened in here is the user's `argument`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # it is open
            raise
        raise Refused(f"{argument}: expected {expected}, got {error.filename}: {error.strerror}") from None


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
