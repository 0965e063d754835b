"""setup.py's decisions (architectures, headers, ninja file), the build record, and the machine code in the library."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torch_moe_ops
from torch_moe_ops.build_info import build_info
from torch_moe_ops.cli.info import table

ROOT = Path(__file__).resolve().parents[1]


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torch_moe_ops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


setup = load_setup()

FAKE_NVCC = "#!/bin/sh\necho 'Cuda compilation tools, release {0}, V{0}.88'\n"


def make_program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make_tools(root: Path, nvcc: str | None = "13.0") -> dict[str, str]:
    """An environment whose PATH has a C++ compiler and, if a version is given, an nvcc that says so."""
    make_program(root / "bin/g++")
    if nvcc:
        make_program(root / "cuda/bin/nvcc", FAKE_NVCC.format(nvcc))
    return {"PATH": str(root / "bin"), "CUDA_HOME": str(root / "cuda")}


def make_torch(place: Path, version: str = "2.13.0+cpu") -> Path:
    header = place / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (place / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    return place / "torch/include"


def make_cutlass(include: Path, version: str = "4.8.1") -> Path:
    (include / "cutlass").mkdir(parents=True)
    lines = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (include / "cutlass/version.h").write_text("".join(f"#define CUTLASS_{name} {value}\n" for name, value in lines))
    return include


# ---- architectures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arches"),
    [
        ("80;90a;100f;120f", ("80", "90a", "100f", "120f")),
        ("8.0, 9.0a", ("80", "90a")),
        ("8.6 90 100 120", ("86", "90a", "100f", "120f")),
        ("90a;90;90a", ("90a",)),
        ("", ()),
        ("None", ()),
    ],
)
def test_parse_arch_list(text: str, arches: tuple[str, ...]) -> None:
    assert setup.parse_arch_list(text) == arches


@pytest.mark.parametrize("text", ["hopper", "75", "110", "90b", "80;;x", "130", "100a", "103f", "121a"])
def test_parse_arch_list_refuses(text: str) -> None:
    with pytest.raises(SystemExit, match="^TORCH_MOE_CUDA_ARCH_LIST: expected entries"):
        setup.parse_arch_list(text)


def test_default_arches_are_the_local_gpu_else_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "local_arches", lambda: ("90a",))
    assert setup.choose_arches({}, (13, 0, 88)) == ("90a",)
    assert setup.choose_arches({"TORCH_MOE_CUDA_ARCH_LIST": "80"}, (13, 0, 88)) == ("80",)
    monkeypatch.setattr(setup, "local_arches", lambda: ())
    assert setup.choose_arches({}, (13, 0, 88)) == ("80", "90a", "100f", "120f")


def test_an_old_nvcc_limits_the_default_and_refuses_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "local_arches", lambda: ())
    assert setup.choose_arches({}, (12, 8, 93)) == ("80", "90a")
    with pytest.raises(SystemExit, match=r"^TORCH_MOE_CUDA_ARCH_LIST: 100f: expected nvcc >= 12\.9, got 12\.8\.93$"):
        setup.choose_arches({"TORCH_MOE_CUDA_ARCH_LIST": "80;100f"}, (12, 8, 93))


def test_a_file_named_after_a_family_is_compiled_for_that_family_only() -> None:
    arches = ("80", "86", "90a", "100f", "120f")
    assert setup.source_arches(Path("gemm_sm80.cu"), arches) == ["80", "86"]
    assert setup.source_arches(Path("gemm_bf16_sm100.cu"), arches) == ["100f"]
    assert setup.source_arches(Path("gemm_sm90.cu"), ("80",)) == []
    assert setup.source_arches(Path("permute.cu"), arches) == list(arches)


def test_gencode_flags_add_ptx_once_for_the_oldest_family() -> None:
    assert setup.gencode_flags(["86", "80", "90a"]) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_80,code=[compute_80,sm_80]",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    assert setup.gencode_flags(["100f"]) == ["-gencode=arch=compute_100f,code=sm_100f"]


# ---- headers ---------------------------------------------------------------------------------------------------------


def test_torch_headers_come_from_the_variable_then_the_first_recent_torch(tmp_path: Path) -> None:
    given = make_torch(tmp_path / "given", "2.12.0")
    old, new = tmp_path / "old", tmp_path / "new"
    make_torch(old, "2.10.1")
    found = make_torch(new)
    assert setup.find_torch({"TORCH_MOE_TORCH_INCLUDE": str(given)}, [new]) == given
    assert setup.find_torch({}, [tmp_path, old, new]) == found
    assert setup.find_torch({}, [old]) is None
    with pytest.raises(SystemExit, match="^TORCH_MOE_TORCH_INCLUDE: expected the include directory of torch >= 2.11"):
        setup.find_torch({"TORCH_MOE_TORCH_INCLUDE": str(old / "torch/include")}, [new])


def test_cutlass_headers_come_from_the_variable_then_either_wheel(tmp_path: Path) -> None:
    given = make_cutlass(tmp_path / "given", "4.2.0")
    place = tmp_path / "site"
    official = make_cutlass(place / "cutlass_library/source/include", "4.2.0")
    assert setup.find_cutlass({}, [place]) == official
    small = make_cutlass(place / "deep_gemm/include")
    assert setup.find_cutlass({}, [tmp_path, place]) == small
    assert setup.find_cutlass({"TORCH_MOE_CUTLASS_INCLUDE": str(given)}, [place]) == given


def test_cutlass_older_than_4_2_is_refused(tmp_path: Path) -> None:
    old = make_cutlass(tmp_path / "deep_gemm/include", "4.1.9")
    assert setup.find_cutlass({}, [tmp_path]) is None
    with pytest.raises(SystemExit, match=r"^TORCH_MOE_CUTLASS_INCLUDE: expected CUTLASS >= 4\.2, got 4\.1\.9 in "):
        setup.find_cutlass({"TORCH_MOE_CUTLASS_INCLUDE": str(old)}, [])


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_missing_tools_mean_no_library_and_no_requirement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "find_nvcc", lambda env: None)
    plan = setup.make_plan({"PATH": str(tmp_path)}, [])
    assert (plan.arches, plan.missing, plan.why_no_library) == ((), [], "no C++ compiler was found")
    plan = setup.make_plan(make_tools(tmp_path, nvcc=None), [])
    assert (plan.arches, plan.missing, plan.why_no_library) == ((), [], "no nvcc was found")


def test_an_empty_arch_list_means_no_library(tmp_path: Path) -> None:
    plan = setup.make_plan(make_tools(tmp_path) | {"TORCH_MOE_CUDA_ARCH_LIST": ""}, [])
    assert (plan.arches, plan.missing, plan.why_no_library) == ((), [], "TORCH_MOE_CUDA_ARCH_LIST is empty")


def test_an_nvcc_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "local_arches", lambda: ("100f",))
    monkeypatch.setattr(setup, "nvcc_version", lambda nvcc: (12, 4, 131))
    plan = setup.make_plan(make_tools(tmp_path), [])
    assert (plan.arches, plan.missing, plan.why_no_library) == ((), [], "nvcc 12.4.131 is too old for 100f")


def test_only_headers_that_are_absent_are_asked_of_pip(tmp_path: Path) -> None:
    env = make_tools(tmp_path) | {"TORCH_MOE_CUDA_ARCH_LIST": "120f;80"}
    assert setup.make_plan(env, []).missing == ["torch>=2.11", "sgl-deep-gemm==0.2.5"]
    make_torch(tmp_path)
    assert setup.make_plan(env, [tmp_path]).missing == ["sgl-deep-gemm==0.2.5"]
    make_cutlass(tmp_path / "deep_gemm/include")
    plan = setup.make_plan(env, [tmp_path])
    assert plan.missing == []
    assert plan.families == ["sm80", "sm120"]


def test_ninja_file_compiles_each_source_for_its_architectures(tmp_path: Path) -> None:
    make_torch(tmp_path)
    make_cutlass(tmp_path / "deep_gemm/include")
    plan = setup.make_plan(make_tools(tmp_path) | {"TORCH_MOE_CUDA_ARCH_LIST": "80;90a"}, [tmp_path])
    names = ["gemm/gemm.cpp", "gemm/gemm_sm90.cu", "gemm/gemm_sm100.cu", "topk/topk.cu"]
    text = setup.ninja_file(plan, [setup.CSRC / name for name in names], tmp_path / "_C.so")
    edges = {edge.split("\n")[0]: re.findall(r",(code=\S+)", edge) for edge in text.split("  name = ")[1:]}
    assert edges == {
        "gemm/gemm.cpp": [],
        "gemm/gemm_sm90.cu": ["code=sm_90a"],
        "topk/topk.cu": ["code=[compute_80,sm_80]", "code=sm_90a"],
    }
    assert "extra = -DTORCH_MOE_SM80 -DTORCH_MOE_SM90\n" in text
    assert "-DTORCH_MOE_SM100" not in text


def test_the_host_module_is_built_where_pybind11_is_installed(tmp_path: Path) -> None:
    make_torch(tmp_path)
    make_cutlass(tmp_path / "deep_gemm/include")
    env = make_tools(tmp_path) | {"TORCH_MOE_CUDA_ARCH_LIST": "80"}
    sources = [setup.CSRC / name for name in ("host/host.cpp", "topk/topk.cu")]
    for is_installed in (False, True):
        if is_installed:
            make_program(tmp_path / "pybind11/include/pybind11/pybind11.h")
        plan = setup.make_plan(env, [tmp_path])
        text = setup.ninja_file(plan, sources, tmp_path / "_C.so")
        assert ("link_module host/host.cpp.o\n" in text) == (plan.pybind_include is not None)
        assert re.search(r"_C\.so: link (.*) \|", text)[1] == "topk/topk.cu.o"
        has_python_headers = Path(setup.sysconfig.get_path("include"), "Python.h").is_file()
        assert (plan.pybind_include is not None) == (is_installed and has_python_headers)
        assert plan.missing == []  # never asked of pip


def test_job_count_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda pid: set(range(64)))
    free_pages = {"SC_AVPHYS_PAGES": 22 * 2**18, "SC_PAGE_SIZE": 2**12}  # 22 GiB
    monkeypatch.setattr(setup.os, "sysconf", free_pages.__getitem__)
    assert setup.Plan().job_count == 3
    monkeypatch.setenv("MAX_JOBS", "5")
    assert setup.Plan().job_count == 5


# ---- what was built --------------------------------------------------------------------------------------------------


def test_build_info_describes_the_installed_library() -> None:
    info = build_info()
    assert torch_moe_ops.build_info() == info
    assert list(info) == list(setup.build_info(setup.Plan(why_no_library="a reason")))
    assert Path(torch_moe_ops.__file__).with_name("_C.so").exists() == info["library"]
    assert bool(info["families"]) == info["library"] == (info["why_no_library"] is None)


def test_the_table_in_the_readme_is_current() -> None:
    assert table() in (ROOT / "README.md").read_text(), "run: python -m torch_moe_ops info --table"


# The tensor-core instructions that the kernels written for a family must contain. The block-scaled ones read scales
# themselves: on SM100 UTCOMMA.4X (nvfp4), UTCOMMA (mxfp4), UTCQMMA with a last operand in tensor memory (mxfp8, alone
# and with mxfp4 weights); on SM120 OMMA.SF with UE4M3 (nvfp4) or E8 (mxfp4), QMMA.SF (mxfp8, with E2M1 for mxfp4).
TENSOR_CORE = {
    "sm80": (r"\bHMMA\.",),
    "sm90": (r"\b[HQ]GMMA\.",),
    "sm100": (r"\bUTC[A-Z]*MMA\b", r"\bUTCOMMA\.4X\b", r"\bUTCOMMA\s", r"\bUTCQMMA\s.*idesc\[\w+\], tmem\["),
    "sm120": (
        r"\bQMMA\.",
        r"\bOMMA\.SF\..*\.UE4M3",
        r"\bOMMA\.SF\..*\.E8",
        r"\bQMMA\.SF\..*\.E4M3\.E4M3\.E8",
        r"\bQMMA\.SF\..*\.E4M3\.E2M1\.E8",
    ),
}


def find_cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    return str(bundled) if bundled and bundled.exists() else None


def has_instruction(cuobjdump: str, library: Path, arch: str, pattern: str) -> bool:
    command = [cuobjdump, "-sass", "-arch", f"sm_{arch}", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        found = any(re.search(pattern, line) for line in process.stdout)
        process.kill()
    return found


@pytest.mark.parametrize("family, pattern", [(family, p) for family, each in TENSOR_CORE.items() for p in each])
def test_s2_20_each_family_has_its_tensor_core_instructions(family: str, pattern: str) -> None:
    arches = [arch for arch in build_info()["cuda_arches"] if setup.family(arch) == family]
    if not arches:
        pytest.skip(f"this build has no {family} kernels")
    if not (cuobjdump := find_cuobjdump()):
        pytest.skip("cuobjdump not found (it comes with CUDA and with triton)")
    library = Path(torch_moe_ops.__file__).with_name("_C.so")
    for arch in arches:
        # cuobjdump lists the code of 100f as sm_100 and that of 90a as sm_90 or sm_90a, by version.
        names = dict.fromkeys((arch, arch.rstrip("af")))
        assert any(has_instruction(cuobjdump, library, name, pattern) for name in names), f"no {pattern} for {arch}"


def stack_bytes(cuobjdump: str, library: Path, arch: str) -> dict[str, int]:
    """Of each kernel."""
    command = [cuobjdump, "--dump-resource-usage", str(library)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    of_arch = re.findall(rf"^arch = {arch}\n(.*?)(?=^arch = |\Z)", output, re.DOTALL | re.MULTILINE)
    return {name: int(size) for name, size in re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+)", "".join(of_arch))}


def test_no_sm90_kernel_has_a_stack() -> None:
    """So nothing is spilled, and the compiler has made no function of what the consumers do, in which every wgmma would
    wait for the one before (it did once: DeepSeek-V3 TP8 at 2048 tokens 515 -> 650 us)."""
    if "90a" not in build_info()["cuda_arches"]:
        pytest.skip("this build has no sm90 kernels")
    if not (cuobjdump := find_cuobjdump()):
        pytest.skip("cuobjdump not found (it comes with CUDA and with triton)")
    stacks = stack_bytes(cuobjdump, Path(torch_moe_ops.__file__).with_name("_C.so"), "sm_90a?")
    assert sum("grouped_gemm_kernel" in name for name in stacks) > 50
    assert {name: size for name, size in stacks.items() if size > 0} == {}


def test_library_loads_without_a_gpu() -> None:
    if not build_info()["library"]:
        pytest.skip("this build has no library")
    torch.ops.load_library(Path(torch_moe_ops.__file__).with_name("_C.so"))
