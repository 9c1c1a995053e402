"""What pyproject.toml cannot say: where kernels/ goes, and how the optional native module is built.

`kernels/` is installed as `fastode.kernels`, so no top-level module called `kernels` exists. `csrc/` is built by CMake
into `fastode._native`, which links no torch. It is optional: without a compiler (or CMake, or pybind11) the install
succeeds without it, and `fastode/_native_build.json` says why; `fastode info` shows it. Environment variables:

    FASTODE_NATIVE=0            do not build it
    FASTODE_CUDA=1              build the CUDA kernels too (needs nvcc); if that fails, the CPU module alone is built
    FASTODE_CUDA_ARCHS="80;90"  for these GPU architectures
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = ["csrc/bindings.cpp", "csrc/combine_cpu.cpp", "csrc/numbers_cpu.cpp"]
MODULE = "_native" + str(sysconfig.get_config_var("EXT_SUFFIX"))


class NotBuilt(Exception):
    """Why there is no native module: one line, then the output of the command that failed, if one did."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log.strip().splitlines()[-40:]


def find_tool(name: str, folder: str) -> str | None:
    """A program from its Python package if that is installed (its `folder` constant), else from PATH."""
    try:
        path = shutil.which(name, path=getattr(importlib.import_module(name), folder))
    except (ImportError, AttributeError):
        path = None
    return path or shutil.which(name)


def run(if_it_fails: str, *command: str | Path) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise NotBuilt(if_it_fails, str(error)) from error
    print(done.stdout, flush=True)
    if done.returncode:
        raise NotBuilt(if_it_fails, done.stdout)


class NativeBuild(build_ext):
    """Builds `fastode._native` if it can, and always leaves `_native_build.json` beside where it belongs."""

    def run(self) -> None:
        in_place = self.editable_mode or self.inplace
        package = ROOT / "fastode" if in_place else Path(self.build_lib).resolve() / "fastode"
        package.mkdir(parents=True, exist_ok=True)
        (package / MODULE).unlink(missing_ok=True)  # the report must never describe a module of an earlier build
        if not in_place:  # NVRTC compiles these headers at run time; in a checkout they are in csrc/ itself
            for header in sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/*.cuh")]):
                (package / "csrc").mkdir(exist_ok=True)
                shutil.copy(header, package / "csrc")

        report: dict[str, object] = {"built": False, "cuda": False, "cuda_archs": None, "reason": None, "log": []}
        archs = os.environ.get("FASTODE_CUDA_ARCHS", "80;90").replace(",", ";")
        for cuda in [True, False] if os.environ.get("FASTODE_CUDA", "0") == "1" else [False]:
            try:
                self.build_native(package, archs if cuda else None)
            except NotBuilt as why:
                (package / MODULE).unlink(missing_ok=True)
                report |= {"reason": f"with CUDA: {why}" if cuda else str(why), "log": why.log}
            else:
                report |= {"built": True, "cuda": cuda, "cuda_archs": archs if cuda else None}
                break
        (package / "_native_build.json").write_text(json.dumps(report, indent=2) + "\n")
        print(f"fastode: native module: {report}", flush=True)

    def build_native(self, package: Path, cuda_archs: str | None) -> None:
        if os.environ.get("FASTODE_NATIVE", "1") == "0":
            raise NotBuilt("FASTODE_NATIVE=0")
        if missing := [source for source in SOURCES if not (ROOT / source).exists()]:
            raise NotBuilt(f"no {', '.join(missing)} in the source tree")
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        if cmake is None:
            raise NotBuilt("CMake was not found")
        try:
            pybind11 = importlib.import_module("pybind11").get_cmake_dir()
        except ImportError:
            raise NotBuilt("the Python package pybind11 was not found") from None

        # Always from scratch: the tools of an isolated build live in a new temporary folder every time.
        build = Path(self.build_temp).resolve() / "native"
        shutil.rmtree(build, ignore_errors=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": package,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11,
            "FASTODE_CUDA": "OFF" if cuda_archs is None else "ON",
        }
        if cuda_archs is not None:
            options["CMAKE_CUDA_ARCHITECTURES"] = cuda_archs
        if ninja is not None:
            options |= {"CMAKE_GENERATOR": "Ninja", "CMAKE_MAKE_PROGRAM": ninja}
        compiler = "C++ compiler" if cuda_archs is None else "C++ compiler and an nvcc"
        defines = [f"-D{name}={value}" for name, value in options.items()]
        run(f"CMake could not configure the build; is there a {compiler}?", cmake, "-S", ROOT, "-B", build, *defines)
        run("csrc/ did not compile", cmake, "--build", build)
        # A module that links may still not load (a missing symbol or library): better known now than at first use.
        load = f"import sys; sys.path.insert(0, {str(package)!r}); import _native"
        run("the module was built but cannot be imported", sys.executable, "-c", load)


readme = ROOT / "README.md"
setup(
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["fastode", "fastode.*"]), "fastode.kernels"],
    package_dir={"fastode": "fastode", "fastode.kernels": "kernels"},
    package_data={
        "": ["*.json"],
        "fastode": ["py.typed", "weights/*.safetensors", "weights/*.json"],
        "fastode.evaluate": ["weights/*", "weights/reference/*", "report/*.html", "report/*.css", "report/*.js"],
    },
    exclude_package_data={"fastode": ["_native_build.json"]},  # each build writes its own
    ext_modules=[
        Extension(
            "fastode._native",
            sources=[source for source in SOURCES if (ROOT / source).exists()],
            depends=["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*.*")))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": NativeBuild},
)
