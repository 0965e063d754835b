"""The experts of a checkpoint on disk as arguments of the ops: `Experts(**load_experts(path, prefix))`.

    files.py    Checkpoint: the tensors of a directory of safetensors files, read one at a time
    schemes.py  what ModelOpt, gpt-oss, DeepSeek and compressed-tensors call an expert's tensors, and what they mean
    load.py     load_experts: w13, w2, their scales, global scales and biases, checked and stacked

Needs the package safetensors (`pip install 'torch_moe_ops[checkpoints]'`).
"""

from .files import Checkpoint
from .load import load_experts

__all__ = ["Checkpoint", "load_experts"]
