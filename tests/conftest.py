"""Shared fixtures; what tests import by name is in moe_cases.py next to this file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from torch_moe_ops.formats import FORMATS  # noqa: E402


@pytest.fixture(params=list(FORMATS))
def format(request: pytest.FixtureRequest) -> str:
    """Every format's name."""
    return request.param
