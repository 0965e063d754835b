"""Runs the portable Triton kernels on CPU tensors, in Triton's interpreter.

The interpreter is chosen when a kernel's module is imported and registered when torch_moe_ops is, so these tests need a
process of their own: `pytest tests/triton`. In a process that is already past that point they are skipped.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if not {"torch_moe_ops", "triton"} & sys.modules.keys():
    os.environ["TRITON_INTERPRET"] = "1"


def _why_skipped() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a process of its own, which starts in Triton's interpreter: pytest tests/triton"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_skipped()
    here = Path(__file__).parent
    for item in items:
        if reason and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
