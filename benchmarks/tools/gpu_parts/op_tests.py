"""The tests of the ops, their kernels run natively, and those that need a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tools.gpu_parts.results import Results

_ROOT = Path(__file__).parents[3]
_DRY = "tests/ops/test_varlen_attention.py"


class _Watch:
    """Counts tests as they end."""

    def __init__(self, results: Results, row: dict[str, Any]) -> None:
        self.results, self.row, self.counts = results, row, Counter[str]()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.row["failures"].append(f"{report.nodeid} can't be read: {_reason(report)}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that is skipped or breaks in its setup has no call.
        if report.when != "call" and not (report.when == "setup" and not report.passed):
            return
        self.counts[report.outcome] += 1
        self.row.update(self.counts)
        if report.failed:
            self.row["failures"].append(f"{report.nodeid}: {_reason(report)}")
        if report.failed or sum(self.counts.values()) % 10 == 0:
            self.results.write()


def _reason(report: Any) -> str:
    lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return lines[-1][1:].strip()[:300] if lines else ""


def run(results: Results) -> None:
    os.chdir(_ROOT)
    # Each process of them builds the kernels that it meets.
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not results.dry else []
    natively = (
        [_DRY, "-k", "test_nothing_to_attend and triton"]
        if results.dry
        else ["tests/ops", "-k", "triton"]
    )
    needy = (
        ["tests/ops/test_flash.py"]
        if results.dry
        else [str(path) for path in _files_with("mark.gpu")]
    )
    for what, chosen in (
        ("tests that need a GPU", [*needy, "-m", "gpu"]),
        ("tests of the kernels", [*natively, *workers]),
    ):
        row = results.add(what, passed=0, failed=0, skipped=0, failures=[])
        watch = _Watch(results, row)
        options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        code = pytest.main([*options, *chosen], plugins=[watch])
        row["ended"] = pytest.ExitCode(code).name
        results.write()


def _files_with(text: str) -> list[Path]:
    files = sorted((_ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if text in file.read_text(encoding="utf-8")]
