"""Checks and fake kernels, one file per op: what an op accepts, and the exact sizes, strides and dtypes of its results.

`check(...)` and `fake(...)` of a file take the op's arguments. The checks run in the fake, in the op's `default`
overload, and in front of every backend called by name, so an error reads the same wherever it is found.
"""
