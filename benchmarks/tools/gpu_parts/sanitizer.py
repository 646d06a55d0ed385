"""compute-sanitizer over the kernels at odd shapes, where it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.tools.gpu_parts import odd_shapes
from benchmarks.tools.gpu_parts.results import Results

_ROOT = Path(__file__).parents[3]
_PLACES = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda/compute-sanitizer",
    "/opt/nvidia/compute-sanitizer",
)


def run(results: Results) -> None:
    if results.dry:
        odd_shapes.main()
        results.add("odd shapes", ran="in the interpreter, without the sanitizer")
        return
    tool = shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES])
    )
    if tool is None:
        results.add("compute-sanitizer", ran="not installed here")
        return
    # Blocks of torch's allocator would hide an access behind a tensor's end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-m", "benchmarks.tools.gpu_parts.odd_shapes"]
    # The kernels are built before, as what builds them needs no watching.
    subprocess.run(command, env=environment, check=True, cwd=_ROOT)
    for check, options in (
        ("memcheck", ["--leak-check", "no"]),
        ("racecheck", ["--racecheck-report", "all"]),
    ):
        row = results.add(check, ran="began")
        done = subprocess.run(
            [tool, "--tool", check, *options, "--target-processes", "all", *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            cwd=_ROOT,
        )
        said = done.stdout + done.stderr
        summaries = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY:.*)", said)
        row.update(
            ran="ended", exit_code=done.returncode, summary=summaries, sound=_is_sound(summaries)
        )
        if not row["sound"]:
            row["said"] = said[-4000:]
        results.write()


def _is_sound(summaries: list[str]) -> bool:
    """Whether there is a summary, and each counts nothing."""
    return bool(summaries) and all(re.search(r"SUMMARY: 0 ", line) for line in summaries)
