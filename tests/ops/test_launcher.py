"""Launches by the launcher are Triton's own, down to the compiled kernel and its arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.test_backends import require_triton

# Triton with a driver that records what it is asked to launch, in a process without its
# interpreter. Tensors of the CPU lie on its device.
_PROGRAM = """
import itertools, json
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Utils:
    def load_binary(self, name, *rest): return next(handles), next(handles), 0, 0, 1024
    def unload_module(self, module): pass
    def get_device_properties(self, device): return {"max_shared_mem": 2**20}

class Launcher:
    def __init__(self, source, metadata): pass
    def __call__(self, *given):
        *grid, stream, function = given[:5]
        arguments = [one.data_ptr() if torch.is_tensor(one) else one for one in given[9:]]
        launched.append([grid, stream, function, arguments])

class Driver:
    utils, launcher_cls, current = Utils(), Launcher, -1
    def get_current_device(self): return self.current
    def get_current_stream(self, device): return 7
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

handles, launched = itertools.count(1), []
driver.set_active(Driver())
from rerank_fast.ops.triton import guard, launcher

@triton.jit(do_not_specialize=["count"])
def kernel(x, y, z, stride, scale, count, BLOCK: tl.constexpr, HAS: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at * stride, mask=at < count, other=0.0) * scale
    if z is not None:
        value += tl.load(z + at, mask=at < count, other=0.0)
    if HAS:
        value += 1
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < count)

x = torch.zeros(64)
cases = {
    "plain": ((x, x, None), (16, 0.5, 33), {"BLOCK": 16, "HAS": True}),
    "another count": ((x, x, None), (16, 0.25, 1), {"BLOCK": 16, "HAS": True}),
    "another constant": ((x, x, None), (16, 0.5, 33), {"BLOCK": 16, "HAS": False}),
    "another block": ((x, x, None), (16, 0.5, 33), {"BLOCK": 32, "HAS": True}),
    "more warps": ((x, x, None), (16, 0.5, 33), {"BLOCK": 16, "HAS": True, "num_warps": 8}),
    "a tensor more": ((x, x, x), (16, 0.5, 33), {"BLOCK": 16, "HAS": True}),
    "another dtype": ((x, x.half(), None), (16, 0.5, 33), {"BLOCK": 16, "HAS": True}),
    "one": ((x, x, None), (1, 0.5, 33), {"BLOCK": 16, "HAS": True}),
    "not divided": ((x, x, None), (3, 0.5, 33), {"BLOCK": 16, "HAS": True}),
    "not aligned": ((x, x[1:], None), (16, 0.5, 33), {"BLOCK": 16, "HAS": True}),
}
def configs_of(config):
    return launcher.constants(HAS=config["HAS"]), made[tuple(config.items())]
made = {
    tuple(one.items()): launcher.Config((name, one[name]) for name in one if name != "HAS")
    for *_, one in cases.values()
}
looked_up = []
by_triton = launcher._by_triton
def counted(*given):
    looked_up[-1] += 1
    return by_triton(*given)
launcher._by_triton = counted
report = {}
for name, (tensors, numbers, config) in cases.items():
    kernel[(5, 2)](*tensors, *numbers, **config)
    looked_up.append(0)
    for grid in ((5, 2), (5, 2), lambda meta: (5, 2)):
        launcher.launch(kernel, grid, tensors, numbers, *configs_of(config))
    report[name] = launched, looked_up[-1]
    launched = []
looked_up.append(0)
Driver.current = 0
launcher.launch(kernel, (1,), *cases["plain"][:2], *configs_of(cases["plain"][2]))
Driver.current, launcher._known, guard.HIP = -1, {}, True
launcher.launch(kernel, (1,), *cases["plain"][:2], *configs_of(cases["plain"][2]))
launcher.launch(kernel, (1,), *cases["plain"][:2], *configs_of(cases["plain"][2]))
print(json.dumps([report, looked_up[-1]]))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, tuple[list, int]], int]:
    require_triton()
    root = Path(__file__).parents[2]
    program = tmp_path_factory.mktemp("launcher") / "program.py"
    program.write_text(_PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, program],
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_same_kernel_gets_the_same_arguments(report: tuple[dict[str, tuple[list, int]], int]):
    kernels = set()
    for name, (launches, _) in report[0].items():
        assert len(launches) == 4, name
        assert all(one == launches[0] for one in launches), name
        kernels.add(launches[0][2])
    assert len(kernels) == len(report[0]) - 1  # a count is no other kernel


def test_triton_looks_a_kernel_up_once(report: tuple[dict[str, tuple[list, int]], int]):
    looked_up = {name: count for name, (_, count) in report[0].items()}
    assert looked_up.pop("another count") == 0
    assert looked_up.pop("not aligned") == 3
    assert set(looked_up.values()) == {1}


def test_triton_launches_on_other_devices_and_vendors(
    report: tuple[dict[str, tuple[list, int]], int],
):
    assert report[1] == 3
