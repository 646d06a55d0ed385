"""On ROCm kernels are launched as the report compiles them for gfx942: with as many warps and
stages, and no option that AMD's compiler does not know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.test_backends import require_triton

# The build for ROCm is told by torch.version.hip, which is read where the kernels are imported.
_PROGRAM = """
import json
import torch
torch.version.hip = "7.0"
from triton.runtime.interpreter import GridExecutor

def where(kernel):
    return f"{kernel.__module__}.{kernel.__name__}"

launched = []
call = GridExecutor.__call__

def record(executor, *arguments, **options):
    blocks = {name for name in executor.arg_names if name.isupper()}
    names = blocks | (set(options) - set(executor.arg_names))
    launched.append([where(executor.fn), {name: options[name] for name in names & set(options)}])
    return call(executor, *arguments, **options)

GridExecutor.__call__ = record
from benchmarks.tools.gpu_parts import odd_shapes
from benchmarks.tools.kernel_report import SOURCES
from rerank_fast.ops.triton import guard

odd_shapes.main()
compiled = [
    [where(variant.kernel.fn), guard.for_vendor(variant.hip_config or variant.config, hip=True)]
    for source in SOURCES
    for variant in source.shipped()
]
print(json.dumps([launched, compiled]))
"""


@pytest.fixture(scope="module")
def launches_and_compiled() -> tuple[list, list]:
    require_triton()
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(root),
        },
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launched, compiled = json.loads(done.stdout.splitlines()[-1])
    return launched, compiled


def test_launches_on_rocm_are_those_that_are_compiled(launches_and_compiled: tuple[list, list]):
    launched, compiled = launches_and_compiled
    assert len({name for name, _ in launched}) >= 10
    for name, options in launched:
        # Blocks follow from sizes, of which the report has those of models.
        own, *configs = (
            {key: value for key, value in one.items() if not key.isupper()}
            for one in (options, *(config for kernel, config in compiled if kernel == name))
        )
        assert own in configs, f"{name} is launched with {own}, compiled with {configs[:3]}"
        assert "maxnreg" not in own
        assert own["num_warps"] * 64 <= 1024, name  # threads of a block


def test_the_options_are_known_to_amds_compiler(launches_and_compiled: tuple[list, list]):
    options = pytest.importorskip("triton.backends.amd.compiler").HIPOptions
    known = set(options.__dataclass_fields__)
    for name, config in launches_and_compiled[1]:
        unknown = {key for key in config if not key.isupper()} - known
        assert not unknown, f"{name}: {unknown}"
