"""The portable backend: one Triton module per op, for every GPU that Triton knows, and for CPU tensors under TRITON_INTERPRET=1."""
