"""The README's table of one machine, a column of ratios for each instruction set: python
benchmarks/tables.py

Runs `pytest benchmarks/ --benchmark-only` once as the machine is and, where it has AVX-512, once as
one without, each in a process of its own, and prints Markdown. What follows -- goes to pytest: -m
slow, -k loss. Nothing else should use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from rerank_fast.ops import cpu

# Of this package's kernels, of PyTorch's, of oneDNN's and of MKL's.
AVX2 = {
    "RERANK_FAST_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def run(environment: dict[str, str], arguments: list[str]) -> list[dict]:
    """The rows of one run of the benchmarks."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "benchmarks/",
            "--benchmark-only",
            "-q",
            "--rows",
            str(rows),
        ]
        # What inductor compiled for another set would be loaded from its cache, and crash.
        cache = {"TORCHINDUCTOR_CACHE_DIR": folder}
        subprocess.run(
            [*command, *arguments],
            env=os.environ | cache | environment,
            check=True,
            stdout=sys.stderr,
        )
        return json.loads(rows.read_text())


def processor() -> str:
    """Its name, as Linux knows it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "processor"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", nargs="*", help="of pytest, after --")
    options = parser.parse_args()
    sets = {cpu.instruction_set(): {}}
    if "avx2" in cpu.instruction_sets() and "avx2" not in sets:
        sets["avx2, stood in for"] = AVX2
    found = {name: run(environment, options.arguments) for name, environment in sets.items()}
    packages = ("torch", "transformers", "sentence-transformers")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    print(
        f"{time.strftime('%Y-%m-%d')}: {processor()}, {torch.get_num_threads()} threads, "
        f"{versions}; medians."
    )
    for name, environment in sets.items():
        flags = (
            " ".join(f"{key}={value}" for key, value in environment.items()) or "as the machine is"
        )
        print(f"{name}: {flags}.")
    print(f"\n| | {' | '.join(f'{name}: peer | ours | ratio' for name in sets)} |")
    print("|---" * (1 + 3 * len(sets)) + "|")
    columns = {name: {row["case"]: row for row in rows} for name, rows in found.items()}
    for case in dict.fromkeys(case for rows in columns.values() for case in rows):
        cells = []
        for rows in columns.values():
            row = rows.get(case)
            cells += _cells(row) if row else ["", "", ""]
        print(f"| {case} | {' | '.join(cells)} |")


def _cells(row: dict) -> list[str]:
    scale, unit = (1e3, "ms") if row["unit"] == "ms" else (2**-20, "MiB")
    if unit == "ms" and row["peer"] >= 1:
        scale, unit = 1.0, "s"
    digits = ".3g" if unit != "MiB" else ".0f"
    sides = (f"{row[side] * scale:{digits}} {unit}" for side in ("peer", "ours"))
    return [*sides, f"{row['peer'] / row['ours']:.1f}x"]


if __name__ == "__main__":
    main()
