"""Types for argparse: text -> value, or an error that says what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable


def names_of(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """A comma-separated list of some of `choices`."""

    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in choices]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(choices)}, got {text}")
        return names

    return parse


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text}")
    return value


def numbers(text: str) -> list[int]:
    """A comma-separated list of positive integers."""
    try:
        values = [int(number) for number in text.split(",") if number]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers, got {text}")
    return values


def not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text}")
    return value
