"""Peak memory of the published training step, each in a process of its own: above the model, with
AdamW's state.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from benchmarks.steps.training import make_peer_step, make_step, peer_precision
from benchmarks.steps.training_memory import resident
from benchmarks.workload import marco_like_lists
from rerank_fast.losses import LambdaLoss as DropIn

MAKE = {
    "ours": make_step,
    "drop-in": lambda lists, _: make_peer_step(lists, loss_class=DropIn),
    "peer": lambda lists, _: make_peer_step(lists),
}


def measure(name: str) -> int:
    """Bytes that a step needs beyond the process before its first."""
    with tempfile.TemporaryDirectory() as output:
        step = MAKE[name](marco_like_lists(16), output)
        before = resident("VmRSS")
        step.small()  # the optimizer's state, which is there in every later step
        step.run()
    return resident("VmHWM") - before


def in_a_process(name: str) -> int:
    command = [sys.executable, "-m", "benchmarks.steps.test_memory", name]
    environment = os.environ | {"RERANK_FAST_BENCH_PEER_PRECISION": peer_precision()}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(benchmark, note):
    ours = benchmark.pedantic(in_a_process, ("ours",), rounds=1)
    peer = in_a_process("peer")
    note("peak memory of a step", ours, peer, "B")
    note("peak memory of a step, drop-in", in_a_process("drop-in"), peer, "B")


if __name__ == "__main__":
    print(measure(sys.argv[1]))
