"""The kernels of every instruction set work on whole registers of it, keep to them, and to their
own set.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter

import pytest

from rerank_fast.ops import cpu

# Widest register of a set.
REGISTERS = {"sse4": "xmm", "avx2": "ymm", "avx512": "zmm", "avx512_bf16": "zmm"}
# What mangled names hold, and the least share of the arithmetic that is on whole registers. Kernels
# that are written in registers have the rest in the ends of rows and in sums of lanes; loops that
# the compiler vectorises bring each of their ends along in halves and in single values.
LOOPS = {
    "fp32_forward": 0.55,
    "fp32_backward": 0.55,
    "5visitIfLNS_9WeightingE0": 0.6,
    "5visitIfLNS_9WeightingE1": 0.6,
    "5visitIfLNS_9WeightingE2": 0.6,
    "5visitIdLNS_9WeightingE0": 0.6,
    "approx_ranks_forward": 0.5,
    "approx_ranks_backward": 0.5,
    "count_ranks": 0.8,
    "largest_small": 0.2,
    "exponentials": 0.1,
    "residual_norm_forward_rows": 0.1,
    "residual_norm_backward_rows": 0.1,
    "ScoreHeadDotE": 0.1,
    "ScoreHeadDotBackwardE": 0.1,
    "int8_quantize_rows": 0.05,
    "int8_scale_rows": 0.1,
    "int8_gelu_rows": 0.2,
    "int8_norm_rows": 0.08,
}
# Arithmetic on packed floats, doubles or integers; moves alone prove nothing.
PACKED = re.compile(
    r"v?(?:(?:add|sub|mul|fn?m(?:add|sub)\d+|div|max|min|cmp\w*)p[sd]|p(?:add|sub|cmp\w*|cmpgt|mulld)[dq]?)"
)
# The same on one value of a register.
SCALAR = re.compile(r"v?(?:add|sub|mul|fn?m(?:add|sub)\d+|div|max|min|cmp\w*)s[sd]")
PAIRS = "vdpbf16ps"  # products of bf16 pairs
TILES = "tdpbf16ps"  # and of tiles of them


@pytest.fixture(scope="module")
def disassembly():
    """By mangled function name: packed arithmetic by the kind of register, and what is on the
    stack.
    """
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs objdump, and a build for x86-64")
    assert cpu.available(), cpu.unavailable_reason()
    import rerank_fast._C as extension

    if (
        "asan"
        in subprocess.run(
            ["ldd", extension.__file__], capture_output=True, text=True, check=True
        ).stdout
    ):
        pytest.skip("a build under a sanitizer is not optimised")
    command = ["objdump", "-d", "--no-show-raw-insn", extension.__file__]
    functions: dict[str, Counter[str]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.endswith(">:\n"):
                name = line.split("<")[1][:-3]
                current = functions.setdefault(name.split(".cold")[0], Counter())
            elif "mm" in line and (found := re.search(r"\t(\w+)\s(.*)", line)):
                operation, operands = found.groups()
                widest = next(kind for kind in ("zmm", "ymm", "xmm", "mm") if kind in operands)
                current[f"any {widest}"] += 1
                if PACKED.fullmatch(operation):
                    current[widest] += 1
                    current["arithmetic"] += 1
                elif SCALAR.fullmatch(operation):
                    current["arithmetic"] += 1
                elif operation in (PAIRS, TILES):
                    current[f"{operation} {widest}"] += 1
                # Moves of whole registers to and from the stack.
                if (
                    "%rsp" in operands
                    and "mov" in operation
                    and not operation.endswith(("ss", "sd"))
                ):
                    current[f"stack {widest}"] += 1
    assert process.returncode == 0
    return functions


def kernels_of(functions, name, loop):
    return {
        key: count
        for key, count in functions.items()
        if loop in key and f"{len(name)}{name}" in key
    }


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", REGISTERS)
def test_kernels_work_on_whole_registers(disassembly, name, loop):
    found = kernels_of(disassembly, name, loop)
    if not found and not kernels_of(disassembly, name, ""):
        pytest.skip(f"built by a compiler that does not know {name}")
    assert found, f"no {loop} for {name}: was it renamed?"
    total = sum(found.values(), Counter())
    full, all_of_them = total[REGISTERS[name]], total["arithmetic"]
    assert full >= max(6, LOOPS[loop] * all_of_them), (full, all_of_them, total)
    # What is multiplied and added up stays in registers.
    if "fp32" in loop:
        assert total[f"stack {REGISTERS[name]}"] <= 0.1 * total[f"any {REGISTERS[name]}"], total


def test_only_kernels_use_what_not_every_processor_has(disassembly):
    """An inline function of the standard library's, compiled for one set and shared with the
    others, would.
    """
    outside = {
        key: count
        for key, count in disassembly.items()
        if (count["any ymm"] or count["any zmm"])
        and not any(f"{len(name)}{name}" in key for name in [*REGISTERS, "amx_bf16"])
    }
    assert not outside, outside
    narrow = kernels_of(disassembly, "avx2", "")
    assert not {key: count for key, count in narrow.items() if count["any zmm"]}
    assert not any(count["any ymm"] for count in kernels_of(disassembly, "sse4", "").values())


@pytest.mark.parametrize("tensors", ["AttentionForward", "AttentionBackward"])
def test_attention_multiplies_pairs(disassembly, tensors):
    found = sum(kernels_of(disassembly, "avx512_bf16", tensors).values(), Counter())
    if not kernels_of(disassembly, "avx512_bf16", ""):
        pytest.skip("built by a compiler that does not know AVX512-BF16")
    # A tile of 8 queries by one or two registers, in each product.
    assert found[f"{PAIRS} zmm"] >= 8 * 5, found
    assert found["zmm"] >= 16, found


@pytest.mark.parametrize(("kernel", "products"), [("AttentionForward", 2), ("8Backward", 5)])
def test_attention_multiplies_tiles(disassembly, kernel, products):
    found = sum(kernels_of(disassembly, "amx_bf16", kernel).values(), Counter())
    if not kernels_of(disassembly, "amx_bf16", ""):
        pytest.skip("built by a compiler that does not know AMX, or not for Linux")
    assert found[f"{TILES} mm"] >= 4 * products, found  # two by two tiles
    assert found["zmm"] >= 0.75 * found["arithmetic"], found
