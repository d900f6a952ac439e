"""Builds csrc/ into focuskernels/_C.abi3.so; everything else about the package stands in pyproject.toml.

FOCUSKERNELS_BUILD=auto (default)  build what the tools at hand allow, and say in one line what was left out
FOCUSKERNELS_BUILD=0               never build
FOCUSKERNELS_BUILD=1               fail where auto would leave the C++ kernels out
MAX_JOBS                           compiler processes at once, default one per core

The stable ABI of PyTorch makes one binary serve torch 2.11 and later, so that torch is needed for its headers and for
the name of a library to link with, but never run. Therefore an isolated build, which does not see the packages of the
environment it installs into, can still use that environment's torch: see `find_torch`.
"""

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
OLDEST_TORCH = (2, 11)
ABI_DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", *ABI_DEFINES]


class Unavailable(Exception):
    """Something the build needs is not here; the message says what."""


def find_torch() -> Path:
    """The folder of the torch package: importable, or installed where this package will be."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent
    else:
        # pip's isolated build hides the environment's packages but runs its interpreter.
        folder = Path(sysconfig.get_path("platlib")) / "torch"
    try:
        version = (folder / "version.py").read_text()
    except OSError:
        raise Unavailable("torch is not installed; install torch>=2.11 first") from None
    numbers = re.search(r"__version__ = ['\"](\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        raise Unavailable(f"the torch in {folder} is older than 2.11")
    return folder


def find_compiler() -> None:
    """Check that there is a C++ compiler."""
    if os.name == "nt":
        raise Unavailable("the C++ kernels are built on Linux and macOS only")
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        raise Unavailable(f"no C++ compiler ({compiler.split()[0]} is not on the PATH)")


def extension() -> Extension:
    """The library, without Python symbols: torch.ops.load_library loads it."""
    torch = find_torch()
    find_compiler()
    return Extension(
        "focuskernels._C",
        [str(source.relative_to(ROOT)) for source in sorted(ROOT.glob("csrc/*.cpp"))],
        depends=[str(header.relative_to(ROOT)) for header in sorted(ROOT.glob("csrc/*.h"))] + ["setup.py"],
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        py_limited_api=True,
    )


class ParallelBuild(build_ext):
    """Compiles sources side by side; without FOCUSKERNELS_BUILD=1 a failure is reported, not raised."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if MODE == "1":
                raise
            report(f"the compiled kernels were left out: {type(error).__name__}: {error}")
            self.extensions = []  # otherwise an in-place build goes on to copy a library that is not there

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        inputs = [Path(path) for path in (*ext.sources, *ext.depends)]
        if not self.force and target.exists() and all(path.stat().st_mtime < target.stat().st_mtime for path in inputs):
            return
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda source: self._compile(ext, source), ext.sources))
        self.mkpath(str(target.parent))
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=ext.libraries,
            library_dirs=ext.library_dirs,
            target_lang="c++",
            extra_postargs=["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [],
        )

    def _compile(self, ext: Extension, source: str) -> str:
        # -isystem: the warnings that we ask for are about our code.
        includes = [flag for folder in ext.include_dirs for flag in ("-isystem", folder)]
        return self.compiler.compile([source], self.build_temp, extra_postargs=[*CXX_FLAGS, *includes])[0]


def report(message: str) -> None:
    if {"egg_info", "dist_info"} & set(sys.argv):
        return  # pip asks for metadata first, then builds; say it once
    print(f"focuskernels: {message}", file=sys.stderr, flush=True)


def extensions() -> list[Extension]:
    """The library, if it may be built and can be here."""
    if MODE == "0":
        return []
    try:
        return [extension()]
    except Unavailable as reason:
        if MODE == "1":
            sys.exit(f"focuskernels: FOCUSKERNELS_BUILD=1, but {reason}")
        report(f"the compiled kernels were left out: {reason}")
        return []


MODE = os.environ.get("FOCUSKERNELS_BUILD", "auto")
if MODE not in ("auto", "0", "1"):
    sys.exit(f"focuskernels: FOCUSKERNELS_BUILD must be auto, 0 or 1, not {MODE!r}")

ext_modules = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass={"build_ext": ParallelBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
