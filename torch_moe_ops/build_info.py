"""What this installation was built from: build_info() -> {library, cuda_arches, families, nvcc, cutlass, commit, ...}.

setup.py writes the record next to the library; keys and their order are the same for every build.
"""

from __future__ import annotations

import json
from pathlib import Path

_RECORD = Path(__file__).with_name("_build_info.json")

_NOT_BUILT = {
    "library": False,  # whether torch_moe_ops/_C.so exists
    "why_no_library": "this source tree was never built (run: pip install .)",
    "cuda_arches": [],  # entries of TORCH_MOE_CUDA_ARCH_LIST, such as "90a"
    "families": [],  # the architecture families they belong to, such as "sm90"
    "nvcc": None,
    "cutlass": None,
    "torch_headers": None,
    "torch_minimum": "2.11",
    "commit": None,
    "date": None,  # UTC
}


def build_info() -> dict[str, object]:
    """The build record. `families` lists the GPU families whose kernels are in the library, e.g. ["sm80", "sm90"]."""
    return json.loads(_RECORD.read_text()) if _RECORD.is_file() else dict(_NOT_BUILT)
