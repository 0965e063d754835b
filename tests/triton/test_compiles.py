"""Triton's real compiler, which needs no GPU, takes grouped_gemm's kernel for each GPU, and its shared memory suffices.

The interpreter of the other tests neither infers layouts nor counts bytes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable

import pytest
import torch
from exact_operands import Operands

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402

import torch_moe_ops as moe  # noqa: E402
from torch_moe_ops.backends import expect_formats  # noqa: E402

# Bytes of shared memory that a program can have.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 120: 99 << 10}
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32",
}  # fmt: skip


def launch_arguments(
    monkeypatch: pytest.MonkeyPatch, sm: int, operands: Operands, **options: object
) -> tuple[object, dict[str, object], dict[str, int]]:
    """(kernel, its arguments by name, options of the compiler), as a GPU's launch would have them."""
    module = importlib.import_module("torch_moe_ops.triton.grouped_gemm")
    kernel, launches = module._grouped_gemm_kernel, []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: launches.append((args, options))

    with monkeypatch.context() as patch:
        patch.setattr(module, "_grouped_gemm_kernel", Recorder())
        patch.setattr(module, "_gpu", lambda device: module.Gpu(sm, SHARED_MEMORY[sm]))
        module.grouped_gemm(*operands.arguments, **operands.options | options)
    [(args, options)] = launches
    arguments = dict(zip(kernel.arg_names, args, strict=False))
    compiler_options = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    return kernel, arguments | options, compiler_options


def compile_for(sm: int, kernel: object, arguments: dict[str, object], options: dict[str, int]) -> CompiledKernel:
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        is_specialised = name not in ("tiles_m", "stride_a_scale_k")
        if name.isupper() or value is None or (is_specialised and isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = POINTERS[value.dtype] if is_tensor else "i32"
        if is_tensor or (is_specialised and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


@pytest.mark.parametrize("format, act_format", [("mxfp4", "bf16"), ("nvfp4", "nvfp4"), ("mxfp8", "mxfp8")])
def test_values_are_loaded_8_or_16_bytes_at_a_time(
    monkeypatch: pytest.MonkeyPatch, format: str, act_format: str
) -> None:  # fmt: skip
    """Also where K ends inside a tile, as 2880 does. Which of the two is up to Triton's version."""
    operands = Operands(format, act_format, [0, 40, 100], 100, 256, 224)
    compiled = compile_for(80, *launch_arguments(monkeypatch, 80, operands))
    ptx = compiled.asm["ptx"]
    widths = set(re.findall(r"cp\.async\.\w+\.shared\.global .*, (\w+), ", ptx))
    assert widths and widths <= {"0x8", "0x10"}
    assert len(re.findall(r"ld\.global\.b8", ptx)) < 16  # a thread's scales; its values are 32 bytes and more


@pytest.mark.parametrize(
    "sm, format, act_format, instruction",
    [
        (80, "nvfp4", "nvfp4", r"mma\.sync.*\.f32\.bf16\.bf16\.f32"),
        (80, "mxfp4", "fp8_block", r"mma\.sync.*\.f32\.bf16\.bf16\.f32"),
        (80, "fp8_block_e8m0", "fp8_block_e8m0", r"mma\.sync.*\.f32\.f16\.f16\.f32"),
        (86, "mxfp8", "fp16", r"mma\.sync.*\.f32\.tf32\.tf32\.f32"),
        (90, "nvfp4", "fp16", r"wgmma.*\.f32\.f16\.f16"),
        (90, "mxfp4", "mxfp8", r"wgmma.*\.f32\.bf16\.bf16"),
        (120, "mxfp8", "mxfp8", r"mma\.sync.*\.f32\.bf16\.bf16\.f32"),
        (120, "fp8_block_e8m0", "bf16", r"mma\.sync.*\.f32\.bf16\.bf16\.f32"),
    ],
)
def test_compiles(
    monkeypatch: pytest.MonkeyPatch, sm: int, format: str, act_format: str, instruction: str
) -> None:  # fmt: skip
    expect_formats("grouped_gemm", "triton", format, act_format, False)
    operands = Operands(format, act_format, [0, 40, 100], 100, 272, 208, parts=2, expert_rows=[30, 60])
    options = {"out_dtype": torch.bfloat16}
    if format in ("nvfp4", "mxfp8"):
        options["b_scale"] = moe.pack_scale(operands.options["b_scale"], "atom")
    launch = launch_arguments(monkeypatch, sm, operands, **options)
    compiled = compile_for(sm, *launch)
    assert re.search(instruction, compiled.asm["ptx"])
    assert compiled.metadata.shared <= SHARED_MEMORY[sm]
