"""Writes docs/api.md from the docstrings of what torch_moe_ops exports: python docs/make_api.py."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import torch_moe_ops as moe
import torch_moe_ops.checkpoints

HEADER = """\
# API

Written by `python docs/make_api.py` from the docstrings. `import torch_moe_ops as moe`; each op is in `torch.ops.moe`
too, with one overload a backend (`torch.ops.moe.fused_moe.triton`). The contracts, to the bit, are in [ops.md](ops.md).
"""
FOOTER = """\
## FORMATS

Name -> `torch_moe_ops.formats.Format`: the table in [ops.md](ops.md#formats).
"""
# In the order of a layer, the whole of it first.
ORDER = (
    ("fused_moe", "Experts", "Experts.from_weights", "Experts.forward", "Experts.options")
    + ("topk", "sort_slots", "quantize", "permute", "grouped_gemm", "act_mul", "finalize")
    + ("quantize_weight", "compute_global_scale", "convert_weight", "fold_global_scale", "to_gate_up", "from_gate_up")
    + ("pack_scale", "unpack_scale", "pack_weight", "unpack_weight", "Experts.packed")
    + ("checkpoints.load_experts", "local_expert_map", "max_rows", "workspace_bytes", "explain", "build_info")
)


def entry(name: str) -> str:
    """A heading, the signature as it is in the source, and the docstring, which is laid out for a fixed-width font."""
    item = moe
    for part in name.split("."):
        item = getattr(item, part)
    function = item.__init__ if inspect.isclass(item) else item
    source = textwrap.dedent(inspect.getsource(function)).replace("@torch.no_grad()\n", "")
    signature = source.partition(":\n    ")[0]
    return f"## {name}\n\n```python\n{signature}\n```\n```text\n{inspect.getdoc(item)}\n```\n"


def text() -> str:
    return "\n".join([HEADER, *map(entry, ORDER), FOOTER])


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(text())
