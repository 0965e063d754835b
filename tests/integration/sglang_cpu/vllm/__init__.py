"""Stands in for the one function of vLLM that SGLang imports on a CPU without sgl_kernel."""
