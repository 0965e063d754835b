"""One op = one name = the same place in every layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from torch_moe_ops.backends import OPS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "layer", ["torch_moe_ops/ops", "meta_kernels", "torch_moe_ops/reference", "torch_moe_ops/triton"]
)
def test_one_module_per_op(layer: str) -> None:
    names = {path.stem for path in (ROOT / layer).glob("*.py") if not path.name.startswith("_")}
    assert names == set(OPS)


def test_one_test_file_per_op() -> None:
    assert {path.stem for path in (ROOT / "tests/ops").glob("*.py")} == {f"test_{op}" for op in OPS}


@pytest.mark.parametrize("op", OPS)
def test_every_layer_opens_with_what_it_computes(op: str) -> None:
    for layer in ("torch_moe_ops/ops", "meta_kernels", "torch_moe_ops/reference", "torch_moe_ops/triton"):
        first = (ROOT / layer / f"{op}.py").read_text().split("\n", 1)[0]
        assert first.startswith('"""') and "[" in first, f"{layer}/{op}.py"


def test_files_stay_short() -> None:
    for folder in ("torch_moe_ops", "meta_kernels", "csrc", "integration", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h"):
                assert len(path.read_text().splitlines()) <= 600, path
