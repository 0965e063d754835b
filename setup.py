"""Build of torch_moe_ops: Python packages and one library, torch_moe_ops/_C.so = link(compile(csrc/**/*.{cu,cpp})).
Where pybind11 is installed, csrc/host becomes the module torch_moe_ops._host beside it, which only tests use.

The library uses LibTorch's stable ABI only, so one build serves every Python and every torch >= 2.11 (wheel tag
py3-none-<platform>). Without nvcc, without a C++ compiler, or with an empty TORCH_MOE_CUDA_ARCH_LIST there is no
library and the wheel is py3-none-any: the reference and Triton backends still work. A missing tool never fails an
install; a failing compile always does. See docs/building.md.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LIBRARY = "torch_moe_ops/_C.so"
BUILD_INFO = "torch_moe_ops/_build_info.json"
HOST_MODULE = f"torch_moe_ops/_host{sysconfig.get_config_var('EXT_SUFFIX')}"  # for tests; of this Python only
OUTPUTS = (LIBRARY, BUILD_INFO, HOST_MODULE)

TORCH_REQUIREMENT = "torch>=2.11"
TORCH_TARGET_VERSION = "0x020B000000000000"  # 2.11: the first stable ABI with every dtype and argument type we use
CUTLASS_REQUIREMENT = "sgl-deep-gemm==0.2.5"  # a 5 MB wheel that carries the CUTLASS 4.8.1 headers, for the build only
CUTLASS_MINIMUM = (4, 2)
DEFAULT_ARCHES = ("80", "90a", "100f", "120f")
DEVICE_FLAGS = ("--expt-relaxed-constexpr", "--expt-extended-lambda", "-Xfatbin=-compress-all", "-diag-suppress=177")
JOB_GIB = 7  # the largest CUTLASS translation unit peaks at 6.1 GiB


# architectures --------------------------------------------------------------------------------------------------------


def family(arch: str) -> str:
    """The architecture family of an entry of the list: "90a" -> "sm90", "86" -> "sm80", "100f" -> "sm100"."""
    return "sm80" if arch.startswith("8") else f"sm{arch[:-1]}"


def parse_arch_list(text: str) -> tuple[str, ...]:
    """ "8.0;90a;100" -> ("80", "90a", "100f"): dots are fine; 90 means 90a, 100 and 120 their family targets.

    Nothing else runs on every GPU of its family, which is what the choice of a backend and of launches goes by.
    """
    if text.strip().lower() in ("", "none"):
        return ()
    arches = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        arch = entry.lower().replace(".", "")
        arch += {"90": "a", "100": "f", "120": "f"}.get(arch, "")
        if not re.fullmatch(r"8\d|90a|100f|120f", arch):
            raise SystemExit(f"TORCH_MOE_CUDA_ARCH_LIST: expected entries like 86, 90a, 100f or 120f, got {entry!r}")
        arches.append(arch)
    return tuple(dict.fromkeys(arches))


def local_arches() -> tuple[str, ...]:
    """One entry per family of GPU in this machine, asked from the driver; () without a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = set()
    for device in range(count.value):
        major = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        found |= {arch for arch in DEFAULT_ARCHES if family(arch) == f"sm{major.value}0"}
    return tuple(arch for arch in DEFAULT_ARCHES if arch in found)


def nvcc_minimum(arch: str) -> tuple[int, int]:
    """The first nvcc that compiles for an entry: family targets came with 12.9."""
    return (12, 9) if arch.endswith("f") else (12, 0)


def choose_arches(env: Mapping[str, str], nvcc: tuple[int, ...]) -> tuple[str, ...]:
    """TORCH_MOE_CUDA_ARCH_LIST, else what nvcc can compile of this machine's GPUs, or of all families without a GPU."""
    text = env.get("TORCH_MOE_CUDA_ARCH_LIST")
    arches = local_arches() or DEFAULT_ARCHES if text is None else parse_arch_list(text)
    possible = tuple(arch for arch in arches if nvcc >= nvcc_minimum(arch))
    if text is not None and possible != arches:
        too_new = next(arch for arch in arches if arch not in possible)
        minimum = "{}.{}".format(*nvcc_minimum(too_new))
        have = ".".join(map(str, nvcc))
        raise SystemExit(f"TORCH_MOE_CUDA_ARCH_LIST: {too_new}: expected nvcc >= {minimum}, got {have}")
    return possible


def gencode_flags(arches: Iterable[str]) -> list[str]:
    """Machine code for each entry, and PTX next to the oldest 8x one: that runs (driver JIT) on every later GPU."""
    arches = list(arches)
    oldest = min((arch for arch in arches if family(arch) == "sm80"), default=None)
    codes = {arch: f"[compute_{arch},sm_{arch}]" if arch == oldest else f"sm_{arch}" for arch in arches}
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes.items()]


def source_arches(source: Path, arches: Iterable[str]) -> list[str]:
    """X_sm90.cu is compiled for the sm90 entries only (maybe none: then not at all), any other file for every entry."""
    suffix = re.search(r"_(sm\d+)$", source.stem)
    return [arch for arch in arches if not suffix or family(arch) == suffix[1]]


# tools and headers ----------------------------------------------------------------------------------------------------


def search_path() -> list[Path]:
    """Where packages are installed. pip's isolated build hides the target from sys.path, not from sysconfig."""
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return [Path(place) for place in dict.fromkeys(places) if place]


def torch_version(include: Path) -> str | None:
    """The version of the torch package around an include directory, read without importing it; None if unusable."""
    version_file = include.parent / "version.py"
    if not (include / "torch/csrc/stable/library.h").is_file() or not version_file.is_file():
        return None
    found = re.search(r"__version__ = '([^']+)'", version_file.read_text())
    return found[1] if found and tuple(map(int, re.findall(r"\d+", found[1])[:2])) >= (2, 11) else None


def find_torch(env: Mapping[str, str], places: Iterable[Path]) -> Path | None:
    """torch's header directory: TORCH_MOE_TORCH_INCLUDE, else an installed torch >= 2.11."""
    if given := env.get("TORCH_MOE_TORCH_INCLUDE"):
        if torch_version(Path(given)) is None:
            raise SystemExit(f"TORCH_MOE_TORCH_INCLUDE: expected the include directory of torch >= 2.11, got {given}")
        return Path(given)
    return next((place / "torch/include" for place in places if torch_version(place / "torch/include")), None)


def cutlass_version(include: Path) -> tuple[int, ...] | None:
    """The version that cutlass/version.h states, or None if there is none."""
    header = include / "cutlass/version.h"
    if not header.is_file():
        return None
    numbers = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH) (\d+)", header.read_text()))
    return tuple(int(numbers[part]) for part in ("MAJOR", "MINOR", "PATCH"))


def find_cutlass(env: Mapping[str, str], places: Iterable[Path]) -> Path | None:
    """CUTLASS's header directory: TORCH_MOE_CUTLASS_INCLUDE, else an installed sgl-deep-gemm or nvidia-cutlass."""
    minimum = ".".join(map(str, CUTLASS_MINIMUM))
    if given := env.get("TORCH_MOE_CUTLASS_INCLUDE"):
        version = cutlass_version(Path(given))
        if version is None or version < CUTLASS_MINIMUM:
            found = ".".join(map(str, version)) if version else "no cutlass/version.h"
            raise SystemExit(f"TORCH_MOE_CUTLASS_INCLUDE: expected CUTLASS >= {minimum}, got {found} in {given}")
        return Path(given)
    wheels = ("deep_gemm/include", "cutlass_library/source/include")
    candidates = [place / inner for inner in wheels for place in places]
    return next((path for path in candidates if (cutlass_version(path) or (0,)) >= CUTLASS_MINIMUM), None)


def find_pybind(places: Iterable[Path]) -> Path | None:
    """pybind11's header directory, if it is installed next to Python's headers; never asked of pip."""
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return None
    candidates = (place / "pybind11/include" for place in places)
    return next((path for path in candidates if (path / "pybind11/pybind11.h").is_file()), None)


def first_program(names: Iterable[str | None], env: Mapping[str, str]) -> str | None:
    found = (shutil.which(name, path=env.get("PATH")) for name in names if name)
    return next((program for program in found if program), None)


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """CUDA_HOME's or CUDA_PATH's nvcc, else the one in PATH, else the customary place."""
    homes = [env[name] for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    return first_program([*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"], env)


def find_cxx(env: Mapping[str, str]) -> str | None:
    return first_program([env.get("CXX"), "g++", "c++"], env)


def nvcc_version(nvcc: str) -> tuple[int, ...]:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"V(\d+)\.(\d+)\.(\d+)", output).groups()))


# plan -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What the build is made from. `arches` is empty when no library is built, and `why_no_library` then says why."""

    arches: tuple[str, ...] = ()
    why_no_library: str | None = None
    nvcc: str | None = None
    cxx: str | None = None
    torch_include: Path | None = None
    cutlass_include: Path | None = None
    pybind_include: Path | None = None

    @property
    def families(self) -> list[str]:
        return sorted({family(arch) for arch in self.arches}, key=lambda name: int(name[2:]))

    @property
    def missing(self) -> list[str]:
        """Packages whose headers the build needs and has not found."""
        if not self.arches:
            return []
        return [TORCH_REQUIREMENT] * (not self.torch_include) + [CUTLASS_REQUIREMENT] * (not self.cutlass_include)

    @property
    def job_count(self) -> int:
        if limit := os.environ.get("MAX_JOBS"):
            return int(limit)
        free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return max(1, min(len(os.sched_getaffinity(0)), int(free_gib / JOB_GIB)))


def make_plan(env: Mapping[str, str] = os.environ, places: Iterable[Path] | None = None) -> Plan:
    places = search_path() if places is None else list(places)
    if not (cxx := find_cxx(env)):
        return Plan(why_no_library="no C++ compiler was found")
    if not (nvcc := find_nvcc(env)):
        return Plan(why_no_library="no nvcc was found")
    version = nvcc_version(nvcc)
    if not (arches := choose_arches(env, version)):
        too_old = f"nvcc {'.'.join(map(str, version))} is too old for {', '.join(local_arches() or DEFAULT_ARCHES)}"
        empty = "TORCH_MOE_CUDA_ARCH_LIST" in env
        return Plan(why_no_library="TORCH_MOE_CUDA_ARCH_LIST is empty" if empty else too_old)
    headers = find_torch(env, places), find_cutlass(env, places), find_pybind(places)
    return Plan(arches, None, nvcc, cxx, *headers)


# ninja ----------------------------------------------------------------------------------------------------------------


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def header_links(plan: Plan) -> dict[str, Path]:
    """Names for the header directories inside the build directory, made of the version: pip's isolated build puts the
    same headers at a new path with new times in each run, and compiling everything again would take minutes."""
    cutlass = "cutlass-" + ".".join(map(str, cutlass_version(plan.cutlass_include)))
    return {cutlass: plan.cutlass_include, f"torch-{torch_version(plan.torch_include)}": plan.torch_include}


def compile_flags(plan: Plan) -> list[str]:
    """Flags of every translation unit. nvcc also drives the host compiler for .cpp files: it knows CUDA's headers."""
    defines = ["-DNDEBUG", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    includes = [f"-I{escape(CSRC)}", *(f"-isystem {name}" for name in header_links(plan))]
    host = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas"
    return [f"-ccbin {escape(plan.cxx)}", "-std=c++20", "-O3", host, *defines, *includes]


def ninja_file(plan: Plan, sources: Iterable[Path], library: Path) -> str:
    """The build graph. Object paths mirror csrc/, so a second build compiles only what changed."""
    flags = " ".join(compile_flags(plan))
    lines = [
        "rule compile",
        f"  command = {escape(plan.nvcc)} {flags} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $name",
        # An empty library with torch's soname makes the linker record the dependency without any torch binary.
        "rule stub",
        f"  command = {escape(plan.cxx)} -shared -x c++ /dev/null -Wl,-soname,libtorch_cpu.so -o $out",
        "  description = stub libtorch_cpu.so",
        "rule link",
        f"  command = {escape(plan.nvcc)} -ccbin {escape(plan.cxx)} -shared -cudart static --no-device-link $in -o $out"
        " -Xlinker --no-as-needed,libtorch_cpu.so,--exclude-libs,ALL",
        "  description = link _C.so",
        "rule link_module",
        f"  command = {escape(plan.cxx)} -shared $in -o $out",
        "  description = link _host",
        "build libtorch_cpu.so: stub",
    ]
    families = [f"-DTORCH_MOE_{name.upper()}" for name in plan.families]
    objects, module_objects = [], []
    for source in sources:
        name = source.relative_to(CSRC)
        linked = module_objects if name.parts[0] == "host" else objects
        if linked is module_objects:
            if not plan.pybind_include:
                continue
            extra = [f"-isystem {escape(path)}" for path in (plan.pybind_include, sysconfig.get_path("include"))]
        elif source.suffix == ".cpp":
            extra = families
        elif arches := source_arches(source, plan.arches):
            extra = [*DEVICE_FLAGS, *families, *gencode_flags(arches)]
        else:
            continue
        linked.append(escape(f"{name}.o"))
        lines += [f"build {linked[-1]}: compile {escape(source)}", f"  name = {name}", f"  extra = {' '.join(extra)}"]
    if module_objects:
        module = library.with_name(Path(HOST_MODULE).name)
        lines.append(f"build {escape(module)}: link_module {' '.join(module_objects)}")
    lines += [f"build {escape(library)}: link {' '.join(objects)} | libtorch_cpu.so", ""]
    return "\n".join(lines)


def run_ninja(build_dir: Path, jobs: int) -> None:
    ninja = shutil.which("ninja") or f"{sysconfig.get_path('scripts')}/ninja"  # pip's isolated build puts it on PATH
    print(f"torch_moe_ops: {jobs} compile job(s) at a time (MAX_JOBS changes it)", flush=True)
    if code := subprocess.run([ninja, "-C", str(build_dir), "-j", str(jobs)]).returncode:
        raise SystemExit(f"torch_moe_ops: the CUDA build failed (exit status {code}); the compiler's message is above")


# build info -----------------------------------------------------------------------------------------------------------


def git_commit() -> str | None:
    if not (ROOT / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def build_info(plan: Plan) -> dict[str, object]:
    """What torch_moe_ops.build_info() returns; keys are the same with and without a library."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    built = bool(plan.arches)
    return {
        "library": built,
        "why_no_library": plan.why_no_library,
        "cuda_arches": list(plan.arches),
        "families": plan.families,
        "nvcc": ".".join(map(str, nvcc_version(plan.nvcc))) if built else None,
        "cutlass": ".".join(map(str, cutlass_version(plan.cutlass_include))) if built else None,
        "torch_headers": torch_version(plan.torch_include) if built else None,
        "torch_minimum": TORCH_REQUIREMENT.removeprefix("torch>="),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)),
    }


# setuptools commands --------------------------------------------------------------------------------------------------


class BuildLibrary(build_ext):
    """Builds into the source tree, so that it is complete, then copies to the wheel unless the build is in place."""

    def run(self) -> None:
        plan = make_plan()
        if plan.missing:
            packages = " ".join(map(repr, plan.missing))
            raise SystemExit(f"torch_moe_ops: headers not found; first run: pip install {packages}")
        library = ROOT / LIBRARY
        if plan.arches:
            print(f"torch_moe_ops: building {LIBRARY} for {';'.join(plan.arches)}", flush=True)
            build_dir = ROOT / "build" / "objects"
            build_dir.mkdir(parents=True, exist_ok=True)
            for name, target in header_links(plan).items():
                (build_dir / name).unlink(missing_ok=True)
                (build_dir / name).symlink_to(target)
            sources = sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cpp")])
            (build_dir / "build.ninja").write_text(ninja_file(plan, sources, library))
            run_ninja(build_dir, plan.job_count)
        else:
            print(f"torch_moe_ops: no CUDA kernels in this build: {plan.why_no_library}", flush=True)
            library.unlink(missing_ok=True)
        if not plan.pybind_include:
            (ROOT / HOST_MODULE).unlink(missing_ok=True)
        (ROOT / BUILD_INFO).write_text(json.dumps(build_info(plan), indent=2) + "\n")
        if not self.inplace:
            for output in OUTPUTS:
                self.copy_output(output)

    def copy_output(self, output: str) -> None:
        target = Path(self.build_lib) / output
        target.unlink(missing_ok=True)
        if (ROOT / output).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / output, target)

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.is_file()]

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [f"{self.build_lib}/{name}" for name in OUTPUTS]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """The library calls no Python function, so the wheel fits every Python 3; without a library, every platform too."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2] if make_plan().arches else "any")


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        """Makes setuptools run build_ext, although no Extension is declared."""
        return True


def packages() -> list[str]:
    """torch_moe_ops; meta_kernels/ and integration/ are installed under it (package-dir in pyproject.toml)."""
    names = find_packages(str(ROOT), include=["torch_moe_ops", "torch_moe_ops.*"])
    for folder in ("meta_kernels", "integration"):
        found = find_packages(str(ROOT), include=[folder, f"{folder}.*"])
        names += [f"torch_moe_ops.{name}" for name in found]
    return names


if __name__ == "__main__":
    setup(
        distclass=Package,
        packages=packages(),
        setup_requires=make_plan().missing,  # pip adds them to the build environment
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    )
