"""Adapters that let serving frameworks call torch_moe_ops, one module or package per framework.

An adapter translates names, layouts and configuration objects into the calls of `docs/ops.md`, and nothing else: it
chooses no backend and knows no kernel. Nothing here is imported by `torch_moe_ops` itself, so no framework has to be
installed.
"""
