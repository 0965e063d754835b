"""Mixture-of-Experts inference for PyTorch: routing, grouped GEMM and fused MoE, from BF16 to NVFP4.

Every op is in `torch.ops.moe` too; `docs/ops.md` is their contract. `print(explain(...))` says which backend runs.
"""

from importlib.metadata import PackageNotFoundError, version

from . import _library as _library  # defines torch.ops.moe
from .backends import explain
from .build_info import build_info
from .conversions import convert_weight, fold_global_scale
from .experts import Experts, from_gate_up, local_expert_map, to_gate_up
from .formats import FORMATS, compute_global_scale, quantize_weight
from .meta_kernels._sizes import max_rows, workspace_bytes
from .ops.act_mul import act_mul
from .ops.finalize import finalize
from .ops.fused_moe import fused_moe
from .ops.grouped_gemm import grouped_gemm
from .ops.pack_scale import pack_scale
from .ops.permute import permute
from .ops.quantize import quantize
from .ops.sort_slots import sort_slots
from .ops.topk import topk
from .ops.unpack_scale import unpack_scale
from .packed_weights import pack_weight, unpack_weight

try:
    __version__ = version("torch_moe_ops")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "FORMATS",
    "Experts",
    "act_mul",
    "build_info",
    "compute_global_scale",
    "convert_weight",
    "explain",
    "finalize",
    "fold_global_scale",
    "from_gate_up",
    "fused_moe",
    "grouped_gemm",
    "local_expert_map",
    "max_rows",
    "pack_scale",
    "pack_weight",
    "permute",
    "quantize",
    "quantize_weight",
    "sort_slots",
    "to_gate_up",
    "topk",
    "unpack_scale",
    "unpack_weight",
    "workspace_bytes",
]
