"""csrc/ built by other compilers and for other processors than this machine's, every instruction
set of them.

The program that runs it also counts LambdaLoss's allocations: none after the first call.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rerank_fast.ops.reference import lambda_loss as reference
from tests.ops import test_relative_attention as relative_attention
from tests.ops import test_varlen_attention as attention
from tests.ops.test_lambda_loss import SCHEMES, ragged

ROOT = Path(__file__).parents[2]
# An emulated processor with all that a set may need, and where the other system's libraries lie.
QEMU = ["qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu"]
X86 = platform.machine() == "x86_64"


def build(command: str, folder: Path, monkeypatch) -> Path:
    """The program of kernels_main.cpp, with csrc/ as setup.py compiles it but for the
    optimisation.
    """
    pytest.importorskip("pybind11", reason="setup.py needs it: pip install -e '.[dev]'")
    pytest.importorskip("setuptools")
    monkeypatch.setenv("CXX", command)
    import setup

    compiler = setup.Compiler()
    sources = [path for path in (ROOT / "csrc").rglob("*.cpp") if path.name != "bindings.cpp"]
    sources.append(Path(__file__).with_name("kernels_main.cpp"))
    flags = [*setup.compile_args, "-O1", "-Werror", f"-I{ROOT / 'csrc'}", *compiler.definitions()]

    def compile_one(source: Path, name: str, own: list[str]) -> str:
        target = str(folder / f"{source.parent.name}-{source.stem}.{name}.o")
        set_flags = [f"-DRERANK_FAST_SET={name}", *own]
        subprocess.run([command, *flags, *set_flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(compile_one, source, name, own)
            for source in sources
            for name, own in compiler.sets_of(source).items()
        ]
        objects = [job.result() for job in jobs]
    subprocess.run([command, *objects, "-ldl", "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.mark.parametrize(
    ("compiler", "emulator", "expected"),
    [
        pytest.param(
            "clang++", [], {"sse4"}, marks=pytest.mark.skipif(not X86, reason="not this processor")
        ),
        pytest.param("aarch64-linux-gnu-g++", QEMU, {"neon", "neon_bf16"}),
    ],
)
def test_same_numbers_by_other_compilers(compiler, emulator, expected, tmp_path, monkeypatch):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    program = build(compiler, tmp_path, monkeypatch)
    if emulator and shutil.which(emulator[0]) is None:
        pytest.skip(f"compiled; to run it takes {emulator[0]}")

    def run(*arguments: str) -> str:
        command = [*emulator, str(program), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def results(name: str, operation: str, *tensors: torch.Tensor) -> bytearray:
        content = [
            tensor.contiguous().view(torch.uint8).numpy().tobytes()
            for tensor in tensors
            if len(tensor)
        ]
        (tmp_path / "in").write_bytes(b"".join(content))
        run(name, operation, str(tmp_path / "in"), str(tmp_path / "out"))
        return bytearray((tmp_path / "out").read_bytes())

    names = run().split()
    assert expected <= set(names)
    for name in names:
        check_lambda_loss(lambda *tensors, name=name: results(name, "lambda_loss", *tensors))
        for dtype in (torch.float32, torch.bfloat16):
            check_attention(lambda *tensors, name=name: results(name, "attention", *tensors), dtype)
            check_relative(lambda *tensors, name=name: results(name, "relative", *tensors), dtype)


def check_lambda_loss(results) -> None:
    for scheme in SCHEMES:
        for k, spread, shift in ((0, 1.0, 0.0), (5, 1.0, -0.5), (0, 1e3, 0.0)):
            scores, labels, offsets = ragged([3, 0, 40, 1, 17, 250], dtype=torch.float32, grades=3)
            scores, labels = scores * spread, labels + shift
            header = torch.tensor([len(offsets) - 1, len(scores), SCHEMES.index(scheme), k])
            result = torch.frombuffer(results(header, offsets, scores, labels), dtype=torch.float32)
            options = dict(scheme=scheme, k=k, sigma=1.0, mu=10.0, eps=1e-10)
            options |= dict(reduction_log="natural", reduction="pairs")
            *eager, _ = reference.forward(scores, labels, offsets, **options)
            *exact, _ = reference.forward(scores.double(), labels.double(), offsets, **options)
            for ours, theirs, true in zip((result[0], result[1:]), eager, exact, strict=True):
                budget = (theirs - true).abs().max() + 8 * torch.finfo(
                    torch.float32
                ).eps * true.abs().max()
                assert (ours - true).abs().max() <= budget


def check_attention(results, dtype: torch.dtype) -> None:
    for (queries, keys), heads, kv_heads, size, softcap in (
        (attention.LENGTHS["same"], 2, 1, 32, None),
        (attention.LENGTHS["fewer queries"], 4, 2, 16, None),
        (attention.LENGTHS["fewer queries"], 4, 2, 16, 2),
        (attention.LENGTHS["more queries"], 1, 1, 12, None),
    ):
        lengths = (queries, keys)
        tensors, grad, ends = attention.make(
            lengths, heads=heads, kv_heads=kv_heads, size=size, dtype=dtype
        )
        sizes = len(queries), sum(queries), sum(keys), heads, kv_heads, size, dtype.itemsize
        header = torch.tensor([*sizes, softcap or 0])
        flat = torch.frombuffer(results(header, *ends, *tensors, grad), dtype=dtype)
        exact, eager = (
            attention.run(
                "reference",
                [t.to(kind) for t in tensors],
                grad.to(kind),
                ends,
                causal=True,
                scale=0.25,
                softcap=softcap,
            )
            for kind in (torch.float64, dtype)
        )
        parts = flat.split([true.numel() for true in exact])
        for ours, theirs, true in zip(parts, eager, exact, strict=True):
            error = (ours.view(true.shape).double() - true).abs().max()
            # Products of bf16 pairs round to odd on some processors: an error of a whole last
            # place.
            rounding = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
            assert error <= 1.5 * (theirs.double() - true).abs().max() + rounding * true.abs().max()


def check_relative(results, dtype: torch.dtype) -> None:
    """All terms of tables that two parts of the sequences share, forward and every gradient."""
    for lengths, positions, size in (
        (([150, 97], [150, 97]), [*range(150), *range(97)], 32),
        (([5, 0, 67, 1], [5, 0, 67, 1]), [*range(5), *range(67), 0], 6),
        (([4, 40, 3], [9, 66, 17]), [*range(3, 7), *range(0, 80, 2), 9, -7, 40], 20),
    ):
        tensors, grad, ends = case = attention.make(lengths, size=size, dtype=dtype)
        own = relative_attention.make_relative(
            tensors, positions=torch.tensor(positions, dtype=torch.int32)
        )
        heads, parts = tensors[0].shape[1], 2
        header = [len(lengths[0]), *map(sum, lengths), heads, size, dtype.itemsize]
        given = (torch.tensor([*header, own.reach, own.num_slots, parts]), *ends)
        given += (own.slots, own.query_positions, own.bias)
        found = results(*given, *tensors, grad, own.keys, own.queries)
        narrow = sum(one.numel() for one in (*tensors, grad))
        rows = torch.frombuffer(found, dtype=dtype, count=narrow).split(
            [one.numel() for one in (grad, *tensors)]
        )
        tables = torch.frombuffer(found, dtype=torch.float32, offset=narrow * dtype.itemsize)
        by_part = tables.split([parts * one.numel() for one in (own.keys, own.queries, own.bias)])
        totals = [
            one.view(parts, heads, own.num_slots, -1).sum(0).transpose(0, 1) for one in by_part
        ]
        relative_attention.assert_near({"": [*rows, *totals]}, case, own, scale=0.25)
