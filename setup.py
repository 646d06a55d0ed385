"""Builds the one extension, rerank_fast._C, from csrc/ with ninja; everything else is in
pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
_AVX2 = ["-msse4.2", "-mavx2", "-mfma", "-mbmi", "-mbmi2"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# GCC takes half registers where it vectorises loops by itself, unless it is told.
_AVX512 += ["-mprefer-vector-width=512"]
# By processor, lowest first: every csrc/**/*_kernels.cpp is compiled once for each of them. Which
# of them a machine has is asked for in csrc/common/dispatch.cpp.
INSTRUCTION_SETS = {
    "x86_64": {
        "sse4": ["-msse4.2"],
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    },
    "aarch64": {"neon": [], "neon_bf16": ["-march=armv8.2-a+bf16"]},
}
# Linux on x86-64 has another one, of tiles: csrc/**/amx_kernels.cpp alone is compiled for it, and
# the other kernels of that set are avx512_bf16's.
_TILES = {"amx_bf16": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]}


class Compiler:
    """The C++ compiler that $CXX names: for which processor it compiles, and which of its sets it
    knows.
    """

    def __init__(self) -> None:
        self.command = os.environ.get("CXX", "c++")
        target = self._run("-dumpmachine")
        machine = target.split("-")[0]
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
        self.sets = self._known(INSTRUCTION_SETS.get(machine, {"portable": []}))
        # Fewer of them, for .ci/sanitize, whose build and tests take long.
        if asked := os.environ.get("RERANK_FAST_SETS", "").split():
            self.sets = {name: flags for name, flags in self.sets.items() if name in asked}
        self.tiles = self._known(_TILES if "avx512_bf16" in self.sets and "linux" in target else {})

    def sets_of(self, source: Path) -> dict[str, list[str]]:
        """The flags of each set that a file is compiled for."""
        if source.stem == "amx_kernels":
            return self.tiles
        return self.sets if source.stem.endswith("_kernels") else {"portable": []}

    def definitions(self) -> list[str]:
        """Of every file: what sets there are."""
        known = [f"-DRERANK_FAST_HAS_{name.upper()}" for name in [*self.sets, *self.tiles]]
        return [f"-DRERANK_FAST_SETS(X)={' '.join(f'X({name})' for name in self.sets)}", *known]

    def _run(self, *arguments: str) -> str:
        command = [*shlex.split(self.command), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
        ).stdout

    def _known(self, sets: dict[str, list[str]]) -> dict[str, list[str]]:
        return {name: flags for name, flags in sets.items() if self._knows(flags)}

    def _knows(self, flags: list[str]) -> bool:
        try:
            self._run(*flags, "-x", "c++", "-fsyntax-only", os.devnull)
        except subprocess.CalledProcessError:
            return False
        return True


def check_complete(root: Path) -> None:
    """Raises FileNotFoundError where csrc/ lacks a header of its own: no compiler would mend
    that.
    """
    files = [path for path in sorted(root.rglob("*")) if path.suffix in (".cpp", ".h")]
    for path in files:
        for header in re.findall(
            r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            if not (root / header).exists():
                raise FileNotFoundError(
                    f"{path} includes {header}, which {root} lacks: this source is incomplete"
                )
    if not files:
        raise FileNotFoundError(f"{root} has no C++ files: this source is incomplete")


class NinjaBuildExt(build_ext):
    """Compiles through ninja, only what changed.

    A build that fails leaves a pure Python install, unless RERANK_FAST_REQUIRE_BUILD=1 asks for the
    kernels.
    """

    def build_extension(self, ext: Extension) -> None:
        check_complete(CSRC)
        try:
            self._build(ext)
        except Exception as error:
            if os.environ.get("RERANK_FAST_REQUIRE_BUILD") == "1":
                raise
            print(
                f"\nWARNING: rerank_fast's CPU kernels were not built ({error}).\n"
                "The install goes on without it and what they do runs through slower eager "
                "PyTorch.\n"
                "To get it: install a C++17 compiler (Debian and Ubuntu: apt-get install g++) and "
                "install again.\n",
                file=sys.stderr,
            )

    def _build(self, ext: Extension) -> None:
        from ninja import BIN_DIR
        from ninja.ninja_syntax import Writer

        compiler = Compiler()
        build = Path(self.build_temp).resolve()
        if self.editable_mode:  # else in a temporary directory, where everything is compiled again
            build = Path("build", f"editable.{self.plat_name}-{sys.implementation.cache_tag}")
            build = build.resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = [*ext.extra_compile_args, *compiler.definitions(), f"-I{CSRC.resolve()}"]
        # Bindings alone see pybind11, which lies elsewhere each time that pip builds in isolation.
        includes = [*ext.include_dirs, *self.compiler.include_dirs, *self.include_dirs]
        bindings = [f"-I{Path(path).resolve()}" for path in includes]
        with (build / "build.ninja").open("w") as file:
            ninja: Any = Writer(file, width=10_000)
            ninja.variable("cxx", compiler.command)
            ninja.variable("cflags", " ".join(shlex.quote(flag) for flag in flags))
            ninja.variable("ldflags", ext.extra_link_args)
            ninja.rule(
                "compile",
                "$cxx -MMD -MF $out.d $cflags $set -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
            ninja.rule("link", "$cxx $in -o $out $ldflags")
            objects = []
            for source in map(Path, ext.sources):
                for name, own in compiler.sets_of(source).items():
                    objects.append(str(build / f"{source.parent.name}-{source.stem}.{name}.o"))
                    seen = bindings if source.stem == "bindings" else []
                    variables = {"set": [f"-DRERANK_FAST_SET={name}", *own, *seen]}
                    ninja.build(objects[-1], "compile", str(source.resolve()), variables=variables)
            ninja.build(str(target), "link", objects)
        subprocess.run([str(Path(BIN_DIR) / "ninja"), "--quiet", "-C", str(build)], check=True)

    def copy_extensions_to_source(self) -> None:
        # An editable install copies what was built; after a failed build there is nothing to copy.
        if all(
            (Path(self.build_lib) / self.get_ext_filename(ext.name)).exists()
            for ext in self.extensions
        ):
            super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]


macos = sys.platform == "darwin"
compile_args = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
]
compile_args += ["-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi"]
link_args = ["-bundle", "-undefined", "dynamic_lookup"] if macos else ["-shared", "-pthread"]
if os.environ.get("RERANK_FAST_SANITIZE") == "1":
    # For the tests of csrc/ (.ci/sanitize): Python must run with libasan preloaded.
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compile_args += ["-O1", "-g", "-fno-omit-frame-pointer", *sanitizers]
    link_args += sanitizers

if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "rerank_fast._C",
                sources=sorted(str(path) for path in CSRC.rglob("*.cpp")),
                include_dirs=[pybind11.get_include()],
                extra_compile_args=compile_args,
                extra_link_args=link_args,
            )
        ],
        cmdclass={"build_ext": NinjaBuildExt},
    )
