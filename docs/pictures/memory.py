"""Peak memory of a training step over the length of a list, with the gradient cache and without."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from colors import BLUE, INK, ORANGE
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

BENCHMARK = ("-m", "benchmarks.steps.training_memory", "documents")
COMMAND = f"python {' '.join(BENCHMARK)}"
LABELS = {"direct": "gradient_cache: off", "cached": "gradient_cache: on"}
# mode, its settings, lists, documents, MiB
_ROW = re.compile(r"^(cached|direct)\b.*?\s1\s+(\d+)\s+(\d+)\s", re.MULTILINE)


def measure() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *BENCHMARK],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return read(done.stdout)


def read(table: str) -> dict[str, Any]:
    """Of what the benchmark prints: for each mode [documents, MiB], where it fitted memory."""
    rows = _ROW.findall(table)
    return {
        mode: [[int(documents), int(peak)] for one, documents, peak in rows if one == mode]
        for mode in LABELS
    }


def draw(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6, 3.4))
    axes = figure.subplots()
    for (mode, label), color in zip(LABELS.items(), (ORANGE, BLUE), strict=True):
        documents, peaks = zip(*figures[mode], strict=True)
        axes.plot(documents, peaks, color=color, marker="o", markersize=4, linewidth=1.8)
        above = (0, 7) if mode == "direct" else (0, -14)
        for x, y in figures[mode]:
            axes.annotate(
                f"{y:,}", (x, y), above, textcoords="offset points", ha="center", color=INK
            )
        axes.annotate(
            label, (documents[-1], peaks[-1]), (12, -3), textcoords="offset points", color=color
        )
    axes.set(xscale="log", yscale="log", xlabel="documents of the list", ylabel="peak MiB")
    axes.xaxis.set_major_locator(FixedLocator([x for x, _ in figures["cached"]]))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.margins(x=0.06, y=0.16)
    return figure
