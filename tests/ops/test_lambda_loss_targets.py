"""The C++ LambdaLoss built for processors other than this machine's: the lower clones of the wheel, and aarch64.

The program that runs it also counts allocations: none after the first call.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rerank_fast.ops import reference
from tests.ops.test_lambda_loss import SCHEMES, ragged

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-Wno-psabi", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}", "-DRERANK_FAST_CLONES="]
X86 = platform.machine() == "x86_64"
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


def build(compiler, flags, folder):
    """The program of lambda_loss_main.cpp, compiled for one processor; what the clones are is compiled as it is."""
    sources = [*(ROOT / "csrc").glob("lambda_loss*.cpp"), ROOT / "csrc/threads.cpp"]
    sources.append(Path(__file__).with_name("lambda_loss_main.cpp"))

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *FLAGS, *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([compiler, *objects, "-ldl", "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.mark.parametrize(
    ("compiler", "flags", "emulator", "runs"),
    [
        pytest.param("g++", ["-march=x86-64"], [], X86, id="SSE2"),
        pytest.param("g++", ["-march=x86-64-v3"], [], X86 and " avx2 " in CPU, id="AVX2"),
        pytest.param(
            "aarch64-linux-gnu-g++",
            [],
            ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"],
            shutil.which("qemu-aarch64-static") is not None,
            id="aarch64",
        ),
    ],
)
def test_same_numbers_on_other_processors(compiler, flags, emulator, runs, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    program = build(compiler, flags, tmp_path)
    if not runs:
        pytest.skip("compiled; can't run here")
    for scheme in SCHEMES:
        for k, spread, shift in ((0, 1.0, 0.0), (5, 1.0, -0.5), (0, 1e3, 0.0)):
            scores, labels, offsets = ragged([3, 0, 40, 1, 17, 250], dtype=torch.float32, grades=3)
            scores, labels = scores * spread, labels + shift
            header = torch.tensor([len(offsets) - 1, len(scores), SCHEMES.index(scheme), k])
            (tmp_path / "in").write_bytes(b"".join(t.numpy().tobytes() for t in (header, offsets, scores, labels)))
            subprocess.run([*emulator, str(program), str(tmp_path / "in"), str(tmp_path / "out")], check=True)
            result = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.float32)
            options = dict(scheme=scheme, k=k, sigma=1.0, mu=10.0, eps=1e-10)
            options |= dict(reduction_log="natural", reduction="pairs")
            eager = reference.forward(scores, labels, offsets, **options)
            exact = reference.forward(scores.double(), labels.double(), offsets, **options)
            for ours, theirs, true in zip((result[0], result[1:]), eager, exact, strict=True):
                budget = (theirs - true).abs().max() + 8 * torch.finfo(torch.float32).eps * true.abs().max()
                assert (ours - true).abs().max() <= budget
