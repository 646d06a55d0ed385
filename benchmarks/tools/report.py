"""Measure what this machine can in under 15 minutes, and renew the tables of the documents.

    python -m benchmarks report                 # this machine's column
    python -m benchmarks report --as_avx2       # as a machine without AVX-512 and bf16
    python -m benchmarks report --add a.json    # what other runs wrote with --rows a.json
    python -m benchmarks report --add           # the tables once more, of what is kept

Every instruction set is a column, kept in benchmarks/results/: new rows take the place of those of
the same case, and other columns stay. Tables of docs/performance.md, docs/families.md and README.md
stand between markers and are made of these files alone. Nothing else should use the machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arguments import make_parser
from benchmarks.results import AS_AVX2, KEPT, Column, Row, Run, columns, quantity

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(ROOT / name for name in ("docs/performance.md", "docs/families.md", "README.md"))
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of the table -->)", re.DOTALL)
_TITLES = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512, bf16",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "sse4": "SSE4.2",
    "neon_bf16": "NEON, bf16",
    "neon": "NEON",
}


@dataclass(frozen=True)
class _Gain:
    """A line of README's table."""

    said: str
    table: str
    case: str  # a pattern of the whole of it
    less: str = ""  # what a gain is, if not speed


_STEP = "107 pairs of MS MARCO lengths, MiniLM-L6"
_GAINS = (
    _Gain(f"training step, {_STEP}", "steps/training_step", r"step, 107 pairs.*"),
    _Gain("the same, only an import changed", "steps/training_step", r"drop-in, 107 pairs.*"),
    _Gain("peak memory of that step", "steps/memory", "peak memory of a step", " less"),
    _Gain("`predict`, fp32", "steps/predict", r"predict fp32, peer fp32, .*"),
    _Gain("LambdaLoss, 64 lists of 100 documents", "ops/lambda_loss", "loss 64 lists x 100 .*"),
)


def title(name: str) -> str:
    """Of a column, in words."""
    own, _, machine = name.partition("-on-")
    said = _TITLES.get(own, own)
    return f"{said}, stood in for by {_TITLES.get(machine, machine)}" if machine else said


def table(name: str, kept: Sequence[Column]) -> str:
    """Markdown: a column an instruction set, a row a case, then how each was measured."""
    found = {column.name: column.rows(name) for column in kept if column.rows(name)}
    if not found:
        return "Not measured yet.\n"
    lines = [
        f"| peer → ours | {' | '.join(map(title, found))} |",
        "|---" * (1 + len(found)) + "|",
    ]
    runs: list[tuple[str, Run]] = []  # each with its column, in the order of their marks
    for case in dict.fromkeys(case for rows in found.values() for case in rows):
        cells = []
        for column, rows in found.items():
            if case not in rows:
                cells.append("")
                continue
            run, row = rows[case]
            if (column, run) not in runs:
                runs.append((column, run))
            cells.append(f"{_cell(row)} [{runs.index((column, run)) + 1}]")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    lines.append("")
    for number, (column, run) in enumerate(runs, 1):
        lines.append(f"{number}. {title(column)}. {run.describe()}; `{run.command}`.")
    return "\n".join(lines) + "\n"


_OF_A_FAMILY = ("step", "step, peak", "predict", "predict, peak")


def families(kept: Sequence[Column]) -> str:
    """Markdown of steps/families: a table for each instruction set, a row for a family in a
    size.
    """
    lines: list[str] = []
    for column in kept:
        found = column.rows("steps/families")
        names = list(dict.fromkeys(case.partition(": ")[0] for case in found))
        if not names:
            continue
        lines += [
            f"{title(column.name)}:",
            "",
            "| padded → packed | step, tokens/s | its peak | predict, tokens/s | its peak |",
            "|---|---|---|---|---|",
        ]
        runs: list[Run] = []
        measured: dict[str, None] = {}
        for name in names:
            of = [found.get(f"{name}: {what}") for what in _OF_A_FAMILY]
            (run, _) = next(one for one in of if one)
            runs += [] if run in runs else [run]
            # The pairs stand below, the padded micro-batches nowhere; an excuse stands here.
            cells = [
                "" if one is None else _cell(one[1], said="".join(one[1].remark.split("; ")[2:]))
                for one in of
            ]
            lines.append(f"| {name} [{runs.index(run) + 1}] | {' | '.join(cells)} |")
            size = name.rpartition(", ")[2]
            for what, one in zip(_OF_A_FAMILY, of, strict=True):
                if one is not None and one[1].remark:
                    said = one[1].remark.partition(";")[0]
                    measured[f"{size}, {what}: {said}"] = None
        lines += ["", f"{'; '.join(measured)}.", ""]
        lines += [f"{at}. {run.describe()}; `{run.command}`." for at, run in enumerate(runs, 1)]
        lines.append("")
    return "\n".join(lines) if lines else "Not measured yet.\n"


def _cell(row: Row, said: str | None = None) -> str:
    """Gain, peer and ours, and what is said of it: its remark, if nothing else."""
    peer = "can't" if row.peer is None else quantity(row.peer, row.unit)
    sides = f"{peer} → {quantity(row.ours, row.unit)}".replace(" tokens/s", "")
    # A figure stays with its unit, however narrow the column.
    sides = sides.replace(" ", "\u00a0").replace("\u00a0→\u00a0", " → ")
    gain = "" if row.gain is None else f"**{_times(row.gain)}** "
    said = row.remark if said is None else said
    return f"{gain}{sides}{f', {said}' if said else ''}"


def _times(gain: float) -> str:
    return f"{gain:.0f}x" if gain >= 100 else f"{gain:.1f}x"


def gains(kept: Sequence[Column]) -> str:
    """README's table: how often better, by the instruction set that was measured or stood in
    for.
    """
    sets = list(dict.fromkeys(column.instruction_set for column in kept))
    lines, runs = [], []
    for gain in _GAINS:
        cells = []
        for one in sets:
            run, cell = _gain_of(gain, [column for column in kept if column.instruction_set == one])
            runs += [run] if run else []
            cells.append(cell)
        lines.append(f"| {gain.said} | {' | '.join(cells)} |")
    head = f"| beside sentence-transformers | {' | '.join(map(title, sets))} |"
    dates = sorted({run.date for run in runs})
    when = " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]]))
    machines = dict.fromkeys(f"{run.processor}, {run.threads} threads" for run in runs)
    note = f"{when}: {'; '.join(machines)}."
    if any("*" in line for line in lines):
        note += " *: a wider machine stood in, with its own instructions switched off."
    ruler = "|---" * (1 + len(sets)) + "|"
    return "\n".join([head, ruler, *lines, "", *textwrap.wrap(note, 118), ""])


def _gain_of(gain: _Gain, kept: Sequence[Column]) -> tuple[Run | None, str]:
    """The newest of the first column that has it: one of its own comes before a stand-in."""
    for column in kept:
        found = [
            (run, row)
            for case, (run, row) in column.rows(gain.table).items()
            if re.fullmatch(gain.case, case) and row.gain
        ]
        if found:
            run, row = found[-1]
            return run, f"{_times(row.gain or 0)}{gain.less}{'*' if column.stands_in else ''}"
    return None, ""


def rendered(page: str, kept: Sequence[Column]) -> str:
    """A page with what its markers name made anew."""
    own = {"gains": gains, "steps/families": families}

    def block(found: re.Match[str]) -> str:
        name = found[2]
        return found[1] + (own[name](kept) if name in own else table(name, kept)) + found[3]

    return _BLOCK.sub(block, page)


def measure(environment: dict[str, str], only: str | None) -> Run:
    """Run the benchmarks in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        chosen = ["-k", only] if only else []
        command = ["benchmarks/", "--benchmark-only", "-q", *chosen]
        # What inductor compiled for another set would be loaded from its cache, and crash.
        environment = {"TORCHINDUCTOR_CACHE_DIR": folder} | environment
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *command, f"--rows={rows}"],
            env=os.environ | environment,
            cwd=ROOT,
            check=False,
        )
        if not rows.is_file():
            raise SystemExit(f"nothing was measured: pytest ended with {done.returncode}")
        if done.returncode:
            print("Not all of it could be measured, see above; the rest is kept.")
        return Run.read(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__)
    parser.prog = "python -m benchmarks report"
    parser.add_argument("--as_avx2", action="store_true", help="stand in for AVX2 alone")
    parser.add_argument("--only", help="an expression of pytest's -k: the rest stays as it is")
    parser.add_argument("--add", type=Path, nargs="*", help="runs' files; nothing is measured")
    options = parser.parse_args(arguments)
    runs = (
        [measure(AS_AVX2 if options.as_avx2 else {}, options.only)]
        if options.add is None
        else map(Run.read, options.add)
    )
    for run in runs:
        column = Column.read(run.column)
        column.add(run)
        column.write()
        print(f"{len(run.rows)} rows are in {KEPT / column.name}.json")
    kept = columns()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(rendered(text, kept), encoding="utf-8")


if __name__ == "__main__":
    main()
