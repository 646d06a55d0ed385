"""The profile of a step names what the compiled kernels do, however they are called."""

import subprocess
import sys

import pytest

from rerank_fast.ops import cpu

_PROGRAM = """
import torch
from torch.profiler import profile
from benchmarks.tools.profile_step import group_of, name_kernels

name_kernels()  # before an op has looked its kernels up
from rerank_fast.ops import lambda_loss, varlen_attention

x, ends = torch.randn(6, 2, 32, requires_grad=True), torch.tensor([0, 2, 6], dtype=torch.int32)
with profile() as run:
    varlen_attention.varlen_attention(x, x, x, ends, ends).sum().backward()
    lambda_loss.lambda_loss(x[:, 0, 0], torch.arange(6.0), ends.long()).backward()
names = {event.key for event in run.key_averages() if event.key.startswith("rerank_fast")}
print(*sorted({group_of(name) for name in names}))
print(*names)
"""


@pytest.mark.skipif(not cpu.available(), reason="needs the compiled kernels")
def test_calls_of_kernels_are_named():
    command = [sys.executable, "-c", _PROGRAM]
    groups, names = subprocess.check_output(command, text=True).splitlines()
    assert "rerank_fast::varlen_attention" in names.split()
    assert "rerank_fast::varlen_attention_backward" in names.split()
    assert "rerank_fast::lambda_loss" in names.split()
    assert groups.split() == ["attention", "loss"]
