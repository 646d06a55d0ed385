"""The clones of csrc's hot loops that are picked at run time hold packed instructions of their registers' width."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter

import pytest

from rerank_fast.ops import cpu

CLONES = {"arch_x86_64_v4": "zmm", "arch_x86_64_v3": "ymm"}
# Mangled names hold them; pairs' loops are one function a weighting.
LOOPS = (
    "gain_float",
    "none_float",
    "every_pair_float",
    "gain_double",
    "none_double",
    "every_pair_double",
    "exponentials",
    "count_ranks",
    "AttentionShape",
    "ResidualNormShape",
    "dot_task",
    "dot_backward_task",
    "quantize_task",
    "scale_task",
    "gelu_task",
    "norm_task",
)
# Arithmetic on the packed floats, doubles, or integers of a whole register; moves alone prove nothing.
ARITHMETIC = re.compile(
    r"v(?:(?:add|sub|mul|fn?m(?:add|sub)\d+|div|max|min|cmp\w*)p[sd]|p(?:add|sub|cmp\w*|cmpgt)[dq])"
)


PAIRS = "vdpbf16ps"  # products of bf16 pairs


@pytest.fixture(scope="module")
def packed():
    """By mangled function name: how many packed arithmetic instructions it has on each kind of register."""
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs objdump, and a build for x86-64")
    assert cpu.available(), cpu.unavailable_reason()
    import rerank_fast._C as extension

    command = ["objdump", "-d", "--no-show-raw-insn", extension.__file__]
    counts: dict[str, Counter[str]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.endswith(">:\n"):
                name = line.split("<")[1][:-3]
                current = counts.setdefault(name, Counter())
            elif "mm" in line:
                found = re.search(r"\t(v\w+)\s.*%([xyz]mm)\d+\b", line)
                if found and ARITHMETIC.fullmatch(found.group(1)):
                    current[found.group(2)] += 1
                elif found and found.group(1) == PAIRS:
                    current[f"{PAIRS} {found.group(2)}"] += 1
    assert process.returncode == 0
    if not any(clone in name for clone in CLONES for name in counts):
        pytest.skip("a build for one processor, or under a sanitizer, has no clones")
    return counts


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("clone", CLONES)
def test_clones_are_vectorised(packed, clone, loop):
    found = {name: count for name, count in packed.items() if loop in name and name.endswith(clone)}
    assert found, f"no clone {clone} of {loop}: was it renamed?"
    for name, count in found.items():
        assert count[CLONES[clone]] >= 8, (name, dict(count))


@pytest.mark.parametrize("function", ["bf16_forward", "bf16_backward"])
def test_attention_multiplies_pairs(packed, function):
    found = [count for name, count in packed.items() if f"{len(function)}{function}E" in name]
    if not found:
        pytest.skip("built by a compiler that does not know AVX512-BF16")
    # A tile of 8 queries by one or two registers, in each product.
    assert found[0][f"{PAIRS} zmm"] >= 8 * 5, dict(found[0])
    assert found[0]["zmm"] >= 16, dict(found[0])
