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
from rerank_fast.ops import lambda_loss, layer_kernels, varlen_attention

x, ends = torch.randn(6, 2, 32, requires_grad=True), torch.tensor([0, 2, 6], dtype=torch.int32)
with profile() as run:
    varlen_attention.varlen_attention(x, x, x, ends, ends).sum().backward()
    lambda_loss.lambda_loss(x[:, 0, 0], torch.arange(6.0), ends.long()).backward()
    layer_kernels.kernels_of("cpu").gated(torch.randn(3, 8), "gelu")
names = {event.key for event in run.key_averages() if event.key.startswith("rerank_fast")}
print(*sorted({group_of(name) for name in names}))
print(*names)
"""
_GROUPS = """
from benchmarks.tools import profile_step

found = []
profile_step._named = lambda name, kernel: found.append(name) or kernel
profile_step.name_kernels()
print(*(name for name in found if profile_step.group_of(name) == "other"))
print(*found)
"""


@pytest.mark.skipif(not cpu.available(), reason="needs the compiled kernels")
def test_calls_of_kernels_are_named():
    command = [sys.executable, "-c", _PROGRAM]
    groups, names = subprocess.check_output(command, text=True).splitlines()
    assert "rerank_fast::varlen_attention" in names.split()
    assert "rerank_fast::varlen_attention_backward" in names.split()
    assert "rerank_fast::lambda_loss" in names.split()
    assert groups.split() == ["activation", "attention", "loss"]


def test_each_kernel_has_a_group():
    others, names = subprocess.check_output([sys.executable, "-c", _GROUPS], text=True).splitlines()
    assert not others
    kernels = {"residual_norm", "score_head_backward", "rotary_grad", "add_norm", "transposed"}
    assert {f"rerank_fast::{name}" for name in kernels} <= set(names.split())
