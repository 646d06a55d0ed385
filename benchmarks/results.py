"""What was measured, where and how: rows of a run, and the runs that are kept of every processor.

benchmarks/results/ has a file for each instruction set; `python -m benchmarks report` adds to it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rerank_fast.ops import cpu

KEPT = Path(__file__).with_name("results")
PACKAGES = ("torch", "transformers", "sentence-transformers", "openvino", "nncf", "onnxruntime")
# What this package's kernels, PyTorch's, oneDNN's and MKL's heed, and inductor's compiler not.
FLAGS = ("RERANK_FAST_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
# By the width of their instructions.
SETS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "sse4", "neon_bf16", "neon")
AS_AVX2 = dict(zip(FLAGS, ("avx2", "avx2", "AVX2", "AVX2"), strict=True))


@dataclass(frozen=True)
class Row:
    """One comparison, by the benchmark that made it."""

    table: str  # room and file: ops/lambda_loss
    case: str
    peer: float | None  # None: it can't
    ours: float
    unit: str = "s"  # seconds, B: bytes, pairs/s
    remark: str = ""

    @property
    def gain(self) -> float | None:
        """How often better ours is, whether less or more is better."""
        if self.peer is None:
            return None
        return self.ours / self.peer if self.unit.endswith("/s") else self.peer / self.ours


@dataclass
class Run:
    """Rows of one machine, one day and one command."""

    date: str
    command: str
    processor: str
    widest_set: str  # that the processor has
    instruction_set: str
    flags: dict[str, str]
    threads: int
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def here(cls, command: str, rows: Iterable[Row] = ()) -> Run:
        """Of this process, today."""
        return cls(
            date=time.strftime("%Y-%m-%d"),
            command=command,
            processor=processor(),
            widest_set=cpu.instruction_sets()[0] if cpu.available() else "none",
            instruction_set=cpu.instruction_set() if cpu.available() else "none",
            flags={name: os.environ[name] for name in FLAGS if name in os.environ},
            threads=torch.get_num_threads(),
            versions={name: found for name in PACKAGES if (found := _version(name))},
            rows=list(rows),
        )

    @classmethod
    def of_script(cls, file: Path | None, module: str, rows: Iterable[Row]) -> None:
        """Write what a script has measured to the file of its --rows, if there is one."""
        if file is not None:
            cls.here(command("python", "-m", module, *sys.argv[1:]), rows).write(file)

    @property
    def column(self) -> str:
        """The name that it is kept by: avx2, or avx2-on-amx_bf16 where a wider one stands in."""
        own = self.instruction_set == self.widest_set
        return self.instruction_set if own else f"{self.instruction_set}-on-{self.widest_set}"

    def describe(self) -> str:
        """Everything but the rows, in one line."""
        flags = " ".join(f"{name}={value}" for name, value in self.flags.items())
        versions = ", ".join(f"{name} {value}" for name, value in self.versions.items())
        return (
            f"{self.date}: {self.processor}, {self.instruction_set}"
            f"{f' ({flags})' if flags else ''}, {self.threads} threads, {versions}"
        )

    def table(self) -> list[str]:
        """Lines for a terminal: what it is, the peer's, ours, how often better, remark."""
        lines = [f"{'case':<66} {'peer':>10} {'ours':>10} {'gain':>8}"]
        for row in self.rows:
            peer = "-" if row.peer is None else quantity(row.peer, row.unit)
            gain = "" if row.gain is None else f"{row.gain:.2f}x"
            ours = quantity(row.ours, row.unit)
            lines.append(f"{row.case:<66} {peer:>10} {ours:>10} {gain:>8}  {row.remark}".rstrip())
        return lines

    def write(self, file: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Run:
        return cls._of(json.loads(file.read_text(encoding="utf-8")))

    @classmethod
    def _of(cls, content: dict) -> Run:
        return cls(**content | {"rows": [Row(**row) for row in content["rows"]]})


@dataclass
class Column:
    """All that is kept of one instruction set; of every case the newest row."""

    name: str
    runs: list[Run]

    @classmethod
    def read(cls, name: str, directory: Path = KEPT) -> Column:
        """Of a directory; without a file an empty one."""
        file = directory / f"{name}.json"
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        return cls(name, [Run._of(one) for one in content])

    def write(self, directory: Path = KEPT) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        content = [dataclasses.asdict(run) for run in self.runs]
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (directory / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")

    @property
    def instruction_set(self) -> str:
        return self.name.partition("-on-")[0]

    @property
    def stands_in(self) -> bool:
        """Whether it was measured on a machine with a wider set."""
        return self.name != self.instruction_set

    def add(self, new: Run) -> None:
        """Its rows in place of those of the same cases; what is left of older runs stays theirs."""
        measured = {(row.table, row.case) for row in new.rows}
        for run in self.runs:
            run.rows = [row for row in run.rows if (row.table, row.case) not in measured]
        self.runs = [run for run in self.runs if run.rows] + [new]

    def rows(self, table: str) -> dict[str, tuple[Run, Row]]:
        """Of a table, by case."""
        return {row.case: (run, row) for run in self.runs for row in run.rows if row.table == table}


def command(*words: str) -> str:
    """As a reader types it: without the file of --rows, and without -q."""
    kept, of_rows = [], False
    for word in words:
        if not (of_rows or word == "-q" or word.startswith("--rows")):
            kept.append(word)
        of_rows = word == "--rows"
    return shlex.join(kept)


def columns(directory: Path = KEPT) -> list[Column]:
    """All that are kept, by the width of their instructions."""
    names = [file.stem for file in directory.glob("*.json")]

    def place(name: str) -> tuple[int, bool, str]:
        own, _, machine = name.partition("-on-")
        return SETS.index(own) if own in SETS else len(SETS), bool(machine), name

    return [Column.read(name, directory) for name in sorted(names, key=place)]


def quantity(value: float, unit: str) -> str:
    """Three digits of it, in the unit that is read most easily."""
    if unit == "s":
        scale, unit = next(
            (one for one in ((1, "s"), (1e3, "ms")) if value * one[0] >= 1), (1e6, "µs")
        )
        value *= scale
    elif unit == "B":
        value, unit = value / 2**20, "MiB"
    digits = f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
    return f"{digits} {unit}"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name as Linux knows it. Virtual machines leave out which AMD EPYC or Intel Xeon it is:
    AMD's get the core, Intel's the tiles where they have them.
    """
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    said = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    name = said.get("model name", platform.machine())
    if said.get("vendor_id") == "GenuineIntel":
        tiles = " with AMX" if "amx_tile" in said.get("flags", "").split() else ""
        return name.replace("(R)", "").removesuffix(" Processor") + tiles
    core = _zen(int(said.get("cpu family", 0)), int(said.get("model", 0)))
    return f"{name} (Zen {core})" if said.get("vendor_id") == "AuthenticAMD" and core else name


_ZEN4 = (range(0x10, 0x20), range(0x60, 0x80), range(0xA0, 0xB0))  # models of family 25


def _zen(family: int, model: int) -> int | None:
    """The generation of an AMD core, by the ranges of numbers that Linux tells them by."""
    if family == 23:
        return 1 if model < 0x30 else 2
    if family == 25:
        return 4 if any(model in of for of in _ZEN4) else 3
    return 5 if family == 26 else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
