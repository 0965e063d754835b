"""The portable backend: one Triton module per op, for every GPU that Triton knows.

CPU tensors run in Triton's interpreter, for tests, where TRITON_INTERPRET=1 was set before the import.
"""
