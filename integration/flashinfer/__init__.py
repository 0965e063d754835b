"""FlashInfer: `cutlass_fused_moe` with FlashInfer's arguments, run by moe::fused_moe. See docs/flashinfer.md.

    fused_moe.py   FlashInfer's arguments in the words of moe::fused_moe

Importing this package imports no FlashInfer.
"""

from .fused_moe import ActivationType, cutlass_fused_moe

__all__ = ["ActivationType", "cutlass_fused_moe"]
