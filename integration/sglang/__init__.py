"""SGLang: `--moe-runner-backend torch_moe` runs the routed experts of a server with moe::fused_moe. See docs/sglang.md.

    support.py   what is taken over, and SGLang's settings in the words of moe::fused_moe (imports no SGLang)
    layer.py     one MoE layer: its weights and its routed tokens -> its output
    hooks.py     the flag, the name and the hooks in SGLang's classes
    check.py     `python -m torch_moe_ops.integration.sglang check MODEL_DIR`

Importing this package imports no SGLang.
"""


def register() -> None:
    """The entry point `torch_moe` of the group `sglang.srt.plugins`; SGLang calls it once in every process."""
    from .hooks import register_hooks, register_name

    register_hooks()  # first: should a class have moved, the flag stays unknown and SGLang refuses it
    register_name()
