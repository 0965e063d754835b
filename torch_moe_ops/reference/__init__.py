"""The definition of every op in plain torch, one file each: the CPU backend, and the measure of the others."""
