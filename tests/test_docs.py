"""The documentation agrees with the code: the API page, the schemas, the README's example, and every link."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import torch_moe_ops as moe
from torch_moe_ops.backends import OPS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md")])


def test_the_api_page_is_current_and_complete() -> None:
    script = runpy.run_path(str(ROOT / "docs/make_api.py"))
    assert (ROOT / "docs/api.md").read_text() == script["text"](), "run: python docs/make_api.py"
    assert {name for name in script["ORDER"] if "." not in name} == set(moe.__all__) - {"FORMATS"}


def test_the_measured_conversions_are_current() -> None:
    script = runpy.run_path(str(ROOT / "docs/make_formats.py"))
    assert (ROOT / "docs/formats.md").read_text() == script["text"](), "run: python docs/make_formats.py"


def test_the_schemas_in_the_contract_are_those_of_the_ops() -> None:
    block = (ROOT / "docs/ops.md").read_text().partition("## Schemas\n```\n")[2].partition("\n```")[0]
    lines = [" ".join(schema.split()) for schema in re.split(r"\n(?=moe::)", block)]
    written = {schema.name: schema for schema in map(torch._C.parse_schema, lines)}
    assert written == {f"moe::{op}": getattr(torch.ops.moe, op).default._schema for op in OPS}


def test_the_example_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["output"].shape == (64, 512) and names["output"].isfinite().all()
    assert "reference     yes" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
