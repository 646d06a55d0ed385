"""The pictures of the documentation, drawn: python docs/pictures/make.py [NAME ...] [--measure]

Those with figures are drawn from the JSON beside them; --measure measures these anew first (a few
minutes for the curve, up to half an hour for memory, on two CPU cores that do nothing else).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import matplotlib

HERE = Path(__file__).parent
DRAWN = ("pair", "packed")
MEASURED = ("curve", "memory")

matplotlib.rcParams |= {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "rerank_fast",  # nor do ids change from run to run
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
}


def circumstances(command: str) -> dict[str, str]:
    """What a figure carries: date, processor, versions and the command."""
    sys.path.append(str(HERE.parents[1]))
    from benchmarks.results import processor
    from rerank_fast.ops import cpu

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": f"{processor()}, {cpu.instruction_set()}",
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "versions": f"rerank_fast {version('rerank-fast')}, {packages}",
        "command": command,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join((*DRAWN, *MEASURED))}; all")
    parser.add_argument("--measure", action="store_true", help="make the figures anew first")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the SVG files")
    options = parser.parse_args()
    for name in options.names or (*DRAWN, *MEASURED):
        if name not in (*DRAWN, *MEASURED):
            parser.error(f"there is no picture {name}: {', '.join((*DRAWN, *MEASURED))}")
        module = import_module(name)
        figures = HERE / f"{name}.json"
        if options.measure and name in MEASURED:
            found = circumstances(module.COMMAND) | module.measure()
            lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
            figures.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        given = [json.loads(figures.read_text(encoding="utf-8"))] if name in MEASURED else []
        file = options.output / f"{name}.svg"
        # A date would make every drawing another file.
        module.draw(*given).savefig(file, metadata={"Date": None}, bbox_inches="tight")
        print(file)


if __name__ == "__main__":
    main()
