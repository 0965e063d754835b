"""Everything in this folder needs a GPU: `pytest -m gpu` runs it, and without a GPU it is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_layers import BF16_LAYOUT, W4A8, why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=("bf16", "fp16", "fp8_block", *BF16_LAYOUT, W4A8))
def sm90_product(request: pytest.FixtureRequest) -> str:
    """All that cutlass_sm90 multiplies in its fused kernel."""
    if reason := why_not("cutlass_sm90"):
        pytest.skip(f"cutlass_sm90: {reason}")
    return request.param
