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
    """The build record.

    Returns:
        library: whether there are CUDA kernels, and why_no_library; cuda_arches and families: for which GPUs, for
        example ["80", "90a"] and ["sm80", "sm90"]; the versions of nvcc, cutlass and torch's headers, the oldest torch,
        the commit, and the date (UTC). What is not known is None.
    """
    return json.loads(_RECORD.read_text()) if _RECORD.is_file() else dict(_NOT_BUILT)
