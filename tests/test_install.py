"""pip's view: wheels, their tags and contents, editable installs, and an install that must fail when a compile fails.

Every test builds a copy of the source tree in which csrc/ is one small file, without build isolation and network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from torch_moe_ops.build_info import build_info

ROOT = Path(__file__).resolve().parents[1]

KERNEL = """
#include <torch/csrc/stable/library.h>
__global__ void add_one(float* x) { x[threadIdx.x] += 1; }
cudaError_t launch_add_one(float* x) { add_one<<<1, 32>>>(x); return cudaGetLastError(); }
"""

needs_nvcc = pytest.mark.skipif(
    build_info()["why_no_library"] in ("no nvcc was found", "no C++ compiler was found"),
    reason="the CUDA build needs nvcc and a C++ compiler",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree with one small CUDA file, and a CUTLASS that is only a version."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    ignore = shutil.ignore_patterns("_C.so", "_host.*", "_build_info.json", "__pycache__")
    for name in ("torch_moe_ops", "meta_kernels", "integration"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    (copy / "csrc/trial").mkdir(parents=True)
    (copy / "csrc/trial/trial.cu").write_text(KERNEL)
    header = copy / "headers/cutlass/version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n")
    return copy


def pip(tree: Path, arches: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs pip on the tree with a library for `arches`."""
    env = os.environ | {"TORCH_MOE_CUDA_ARCH_LIST": arches, "TORCH_MOE_CUTLASS_INCLUDE": str(tree / "headers")}
    options = ["--no-build-isolation", "--no-deps", "--disable-pip-version-check", "--no-input"]
    line = [sys.executable, "-m", "pip", command[0], "-v", *options, *command[1:], str(tree)]
    return subprocess.run(line, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def build_wheel(tree: Path, arches: str) -> Path:
    result = pip(tree, arches, "wheel", "--wheel-dir", str(tree / "dist"))
    assert result.returncode == 0, result.stdout + result.stderr
    [wheel] = (tree / "dist").iterdir()
    return wheel


def test_wheel_without_a_library_is_pure_python(tree: Path) -> None:
    wheel = build_wheel(tree, "none")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = json.loads(archive.read("torch_moe_ops/_build_info.json"))
    assert info["why_no_library"] == "TORCH_MOE_CUDA_ARCH_LIST is empty"
    assert {name.split("/")[0].split("-")[0] for name in names} == {"torch_moe_ops"}  # no bare meta_kernels, tests, ...
    for folder in ("meta_kernels", "integration", "cli", "ops", "reference", "triton"):
        assert f"torch_moe_ops/{folder}/__init__.py" in names
    assert "torch_moe_ops/_C.so" not in names
    assert len(names) == len(set(names))


@needs_nvcc
def test_wheel_with_a_library_fits_every_python(tree: Path) -> None:
    wheel = build_wheel(tree, "80")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("torch_moe_ops/_C.so")
        info = json.loads(archive.read("torch_moe_ops/_build_info.json"))
    assert library == (tree / "torch_moe_ops/_C.so").read_bytes()  # the source tree is complete, too
    assert b"libtorch_cpu.so" in library and b"add_one" in library
    assert (info["library"], info["cuda_arches"], info["families"]) == (True, ["80"], ["sm80"])
    assert info["cutlass"] == "4.2.0"


@needs_nvcc
def test_a_failing_compile_fails_the_install(tree: Path) -> None:
    (tree / "csrc/trial/broken.cpp").write_text("this is not C++;\n")
    result = pip(tree, "80", "wheel", "--wheel-dir", str(tree / "dist"))
    assert result.returncode != 0
    assert "torch_moe_ops: the CUDA build failed" in result.stdout + result.stderr
    assert not (tree / "dist").exists() or not any((tree / "dist").iterdir())


def test_turning_the_library_off_removes_a_stale_one(tree: Path) -> None:
    stale = tree / "torch_moe_ops/_C.so"
    stale.write_bytes(b"of an earlier build")
    with zipfile.ZipFile(build_wheel(tree, "")) as archive:
        assert "torch_moe_ops/_C.so" not in archive.namelist()
    assert not stale.exists()


SHOW_ORIGINS = """
import importlib.util, site, sys
site.addsitedir(sys.argv[1])
for name in sys.argv[2:]:
    spec = importlib.util.find_spec(name)
    print(spec.origin if spec else "absent")
"""


def test_editable_install_maps_the_packages_and_nothing_else(tree: Path, tmp_path: Path) -> None:
    (tree / "torch_moe_ops/__init__.py").write_text("")  # looking sub-packages up imports it, and torch is not at hand
    prefix = tmp_path / "prefix"
    result = pip(tree, "none", "install", "--prefix", str(prefix), "--ignore-installed", "--editable")
    assert result.returncode == 0, result.stdout + result.stderr
    [site_packages] = prefix.glob("lib*/python*/*-packages")
    names = ["torch_moe_ops", "torch_moe_ops.meta_kernels", "torch_moe_ops.integration", "meta_kernels", "integration"]
    command = [sys.executable, "-I", "-S", "-c", SHOW_ORIGINS, str(site_packages), *names]
    origins = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert all(origin.startswith(str(tree)) for origin in origins[:3]), origins
    assert origins[3:] == ["absent", "absent"]
