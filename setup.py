"""Builds the one extension, rerank_fast._C, from csrc/ with ninja; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class NinjaBuildExt(build_ext):
    """Compiles through ninja, only what changed. A build that fails leaves a pure Python install."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:
            print(
                f"\nWARNING: rerank_fast's CPU kernels were not built ({error}).\n"
                "The install goes on without it and what they do runs through slower eager PyTorch.\n"
                "To get it: install a C++17 compiler (Debian and Ubuntu: apt-get install g++) and install again.\n",
                file=sys.stderr,
            )

    def _build(self, ext: Extension) -> None:
        from ninja import BIN_DIR
        from ninja.ninja_syntax import Writer

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in (*ext.include_dirs, *self.compiler.include_dirs, *self.include_dirs)]
        with (build / "build.ninja").open("w") as file:
            ninja: Any = Writer(file)
            ninja.variable("cxx", os.environ.get("CXX", "c++"))
            ninja.variable("cflags", [*ext.extra_compile_args, *includes])
            ninja.variable("ldflags", ext.extra_link_args)
            ninja.rule("compile", "$cxx -MMD -MF $out.d $cflags -c $in -o $out", depfile="$out.d", deps="gcc")
            ninja.rule("link", "$cxx $in -o $out $ldflags")
            objects = []
            for source in ext.sources:
                object_file = str(build / (Path(source).stem + ".o"))
                ninja.build(object_file, "compile", str(Path(source).resolve()))
                objects.append(object_file)
            ninja.build(str(target), "link", objects)
        subprocess.run([str(Path(BIN_DIR) / "ninja"), "-C", str(build)], check=True)

    def copy_extensions_to_source(self) -> None:
        # An editable install copies what was built; after a failed build there is nothing to copy.
        if all((Path(self.build_lib) / self.get_ext_filename(ext.name)).exists() for ext in self.extensions):
            super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]


macos = sys.platform == "darwin"
compile_args = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno"]
compile_args += ["-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wno-psabi"]
link_args = ["-bundle", "-undefined", "dynamic_lookup"] if macos else ["-shared", "-pthread"]
if os.environ.get("RERANK_FAST_NATIVE") == "1":
    compile_args.append("-march=native")
if os.environ.get("RERANK_FAST_SANITIZE") == "1":
    # For the tests of csrc/ (.ci/sanitize): Python must run with libasan preloaded.
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compile_args += ["-O1", "-g", "-fno-omit-frame-pointer", *sanitizers]
    link_args += sanitizers

setup(
    ext_modules=[
        Extension(
            "rerank_fast._C",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
