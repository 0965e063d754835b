"""A plugin of SGLang for tests: expert parallelism on a CPU, where SGLang's dispatcher asks for an accelerator."""


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.utils.common.get_device", lambda *_, **__: "cpu", HookType.REPLACE)
