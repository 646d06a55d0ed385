"""What the set with tiles needs that the others do not: a permission, and to leave nothing
behind.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rerank_fast.ops import cpu
from tests.ops import test_varlen_attention as attention

SETS = cpu.instruction_sets()
pytestmark = pytest.mark.skipif("amx_bf16" not in SETS, reason="no AMX here")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> str:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++")
    library = tmp_path_factory.mktemp("amx") / "stand_ins.so"
    source = Path(__file__).with_name("amx_stand_ins.cpp")
    subprocess.run(
        [compiler, "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True
    )
    return str(library)


@pytest.fixture
def on_tiles():
    before = cpu.instruction_set()
    cpu.choose_instruction_set("amx_bf16")
    yield
    cpu.choose_instruction_set(before)


@pytest.mark.parametrize("named", [None, "amx_bf16"])
def test_without_the_system_s_permission_there_is_no_such_set(stand_ins, named):
    preloaded = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), stand_ins]))
    environment = {**os.environ, "LD_PRELOAD": preloaded, "RERANK_FAST_ISA": named or ""}
    code = "from rerank_fast.ops import cpu; print(*cpu.instruction_sets())"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    others = [name for name in SETS if name != "amx_bf16"]
    if named is None:
        assert result.stdout.split() == others, result.stderr
    else:
        assert f"this machine has ({', '.join(others)}), got 'amx_bf16'" in result.stderr


@pytest.mark.usefixtures("on_tiles")
def test_no_tiles_are_left_behind(stand_ins):
    """Else every switch between threads saves and restores 8 KiB."""
    in_use = ctypes.CDLL(stand_ins).tiles_in_use
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the thread that asks
    try:
        attention.run("cpu", *attention.make(([40], [40]), dtype=torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert in_use() == 0  # whatever oneDNN's products left before


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"dropout_p": 0.2, "seed": 7}, {"causal": True, "softcap": 1.5}],
    ids=str,
)
def test_as_exact_as_the_set_below(options):
    """In the mean: nothing is rounded once more than there."""
    lengths = [100, 250, 33]
    tensors, grad, ends = attention.make((lengths, lengths), heads=2, dtype=torch.bfloat16)
    exact = attention.run(
        "reference", [t.double() for t in tensors], grad.double(), ends, **options
    )
    before, errors = cpu.instruction_set(), {}
    try:
        for name in ("avx512_bf16", "amx_bf16"):
            cpu.choose_instruction_set(name)
            results = attention.run("cpu", tensors, grad, ends, **options)
            pairs = zip(results, exact, strict=True)
            errors[name] = torch.stack(
                [(ours.double() - true).abs().mean() for ours, true in pairs]
            )
    finally:
        cpu.choose_instruction_set(before)
    assert (errors["amx_bf16"] <= 1.05 * errors["avx512_bf16"]).all(), errors
