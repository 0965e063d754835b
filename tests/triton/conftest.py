"""Runs the portable Triton kernels on CPU tensors, in Triton's interpreter.

The interpreter is chosen once a process, before torch_moe_ops is imported: `TRITON_INTERPRET=1 pytest tests/triton`.
Anywhere else test_in_interpreter.py starts that process, and the other tests of this folder are skipped; but
test_compiles.py is for the compiler.
"""

import importlib.util
import os
from pathlib import Path

import pytest

OUTSIDE = ("test_in_interpreter.py", "test_compiles.py")


def _why_skipped(item: pytest.Item) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package"
    is_outside = item.path.name in OUTSIDE
    if is_outside == (os.environ.get("TRITON_INTERPRET") == "1"):
        return "not for the interpreter" if is_outside else "runs in test_in_interpreter.py's process"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and (reason := _why_skipped(item)):
            item.add_marker(pytest.mark.skip(reason=reason))
