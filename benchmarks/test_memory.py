"""Peak memory of the published training step, each in a process of its own: above the model, with
AdamW's state.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile

import pytest

from benchmarks.training_memory import _resident
from benchmarks.workload import make_steps, marco_like_lists, peer_precision


def measure(name: str, mini_batch_size: int) -> int:
    """Bytes that two steps need beyond the process before its first."""
    with tempfile.TemporaryDirectory() as output:
        steps = make_steps(marco_like_lists(16), output, mini_batch_size=mini_batch_size)
        before = _resident("VmRSS")
        for _ in range(2):
            getattr(steps, name)()
    return _resident("VmHWM") - before


@functools.cache
def _in_a_process(name: str, mini_batch_size: int) -> int:
    command = [sys.executable, "-m", "benchmarks.test_memory", name, str(mini_batch_size)]
    environment = os.environ | {"RERANK_FAST_BENCH_PEER_PRECISION": peer_precision()}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["ours", "drop_in"])
def test_peak_memory(benchmark, compare_memory, name):
    ours = benchmark.pedantic(_in_a_process, (name, 16), rounds=1)
    compare_memory(
        f"peak memory of a step, {name}, peer 16 a forward", ours, _in_a_process("peer", 16)
    )


if __name__ == "__main__":
    print(measure(sys.argv[1], int(sys.argv[2])))
