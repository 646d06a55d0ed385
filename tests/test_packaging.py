"""What is built from: the sdist holds all of it, and a build that lacks something says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="setup.py needs it: pip install -e '.[dev]'")

ROOT = Path(__file__).parents[1]
_BUILT_FROM = (
    "csrc",
    "rerank_fast",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "setup.py",
)
_BUILD = """
import runpy, sys
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout without what an earlier build left in it."""
    target = tmp_path_factory.mktemp("source")
    left = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    for name in _BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=left)
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def run(directory: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_sdist_holds_what_a_build_needs(source: Path, tmp_path: Path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = run(source, code)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        there = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    files = [
        path
        for name in ("csrc", "rerank_fast")
        for path in (source / name).rglob("*")
        if path.is_file()
    ]
    assert {str(path.relative_to(source)) for path in files} <= there
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "rerank_fast/py.typed"} <= there


@pytest.mark.parametrize("missing", ["csrc/common/lanes.h", "csrc/attention/attention.h"])
def test_a_source_without_its_headers_is_no_build(missing: str, source: Path, tmp_path: Path):
    """With or without a compiler: an install that succeeds would have no kernels."""
    shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns(Path(missing).name))
    done = run(tmp_path / "source", _BUILD)
    assert done.returncode != 0
    assert f"includes {missing.removeprefix('csrc/')}, which csrc lacks" in done.stderr


@pytest.mark.parametrize(("required", "code"), [("1", 1), ("0", 0)])
def test_kernels_that_must_be_built(required: str, code: int, source: Path, tmp_path: Path):
    """No compiler: a warning, or an error where the build is asked to have them."""
    shutil.copytree(source, tmp_path / "source")
    done = run(
        tmp_path / "source", _BUILD, CXX="no-such-compiler", RERANK_FAST_REQUIRE_BUILD=required
    )
    assert done.returncode == code
    assert ("CPU kernels were not built" in done.stderr) == (code == 0)
