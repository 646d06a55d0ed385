"""Everything there is to know of this package on a GPU, in one command and a few minutes.

    python -m benchmarks.tools.gpu_check --output DIR
    python -m benchmarks.tools.gpu_check --output DIR --dry_run     # small, without a GPU

Each part is a process of its own that ends at its time limit, and writes DIR/<part>.json as it
goes: what was measured, what the model of a GPU's step (gpu_model.py) says of the same, and what
could not run and why. Nothing is fetched and nothing is compiled but Triton's kernels; the compiled
module may be absent. DIR/summary.md has all rows; a table of it is printed last. The exit status is
1 where a part did not end, or found something unsound.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.arguments import make_parser

# By what is needed first; seconds that each may take, and eight minutes together.
PARTS = {
    "ceilings": 20,
    "models": 70,
    "syncs": 40,
    "steps": 110,
    "kernels": 75,
    "op_tests": 90,
    "sanitizer": 75,
}
_ROOMS = "benchmarks.tools.gpu_parts"


def work(part: str, output: Path, dry: bool) -> None:
    """In a part's process."""
    os.setsid()  # it ends with all that it starts
    with (output / f"{part}.log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from benchmarks.tools.gpu_parts.results import Results

    results = Results(output / f"{part}.json", dry)
    results.write()
    try:
        importlib.import_module(f"{_ROOMS}.{part}").run(results)
    except BaseException as error:
        traceback.print_exc()
        message = str(error).strip().splitlines() or [""]
        results.write(f"failed: {type(error).__name__}: {message[0]}")
        raise SystemExit(1) from None
    results.write("ended")


def run_part(part: str, output: Path, limit: float, *, dry: bool) -> dict[str, Any]:
    """What it has written when it ends, by itself or at its limit; with its seconds."""
    from benchmarks.tools.gpu_parts.results import write_json

    # A new process for each, as one that a GPU is lost in takes its context along. Without one they
    # are copies of this process, which spares them their imports.
    context = multiprocessing.get_context("fork" if dry else "spawn")
    process = context.Process(target=work, args=(part, output, dry))
    started = time.monotonic()
    process.start()
    process.join(limit)
    stopped = process.is_alive()
    if stopped:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not come to a group of its own
            process.kill()
        process.join()
    file = output / f"{part}.json"
    content: dict[str, Any] = {"device": "", "state": "", "rows": []}
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
    if stopped:
        content["state"] = f"stopped at its limit of {limit:.0f} s"
    elif content["state"] in ("", "running"):
        content["state"] = f"ended by itself with {process.exitcode}"
    content["seconds"] = round(time.monotonic() - started, 1)
    write_json(file, content)
    return content


def is_sound(content: dict[str, Any]) -> bool:
    """Whether a part ended and none of its rows says otherwise."""
    return content["state"] == "ended" and not any(map(_is_unsound, content["rows"]))


def _is_unsound(row: dict[str, Any]) -> bool:
    return row.get("sound") is False or bool(row.get("failures"))


def summary(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a section a part, a line a row, without what has many values."""
    lines = ["# GPU check", ""]
    for part, content in found.items():
        lines += [
            f"## {part}: {content['state']}, {content['seconds']} s, on {content['device']}",
            "",
        ]
        lines += [*map(_line, content["rows"]), ""]
    return "\n".join(lines)


def table(found: dict[str, dict[str, Any]]) -> str:
    """How each part ended, then what is wrong, what the GPU reaches, and our runs beside the
    model's and the peer's.
    """
    lines = ["| part | state | seconds | rows | unsound |", "| --- | --- | ---: | ---: | ---: |"]
    kept = []
    for part, content in found.items():
        rows = content["rows"]
        unsound = [row for row in rows if _is_unsound(row)]
        cells = (part, content["state"], content["seconds"], len(rows), len(unsound))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        kept += unsound
        if part == "ceilings":
            kept += rows
        kept += [
            row
            for row in rows
            if "modelled_launches" in row or row.get("measured_ratio") is not None
        ]
    return "\n".join([*lines, "", *map(_line, kept)])


def _line(row: dict[str, Any]) -> str:
    kept = {name: value for name, value in row.items() if name != "what" and _is_short(value)}
    return f"- {row['what']}: " + ", ".join(
        f"{name} {_short(value)}" for name, value in kept.items()
    )


def _is_short(value: Any) -> bool:
    return value is not None and not isinstance(value, dict) and value != []


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__name__)
    parser.add_argument("--output", type=Path, required=True, help="directory of what is found")
    parser.add_argument("--dry_run", action="store_true", help="all parts small, without a GPU")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        for part in options.parts:
            importlib.import_module(f"{_ROOMS}.{part}")
    else:
        import torch

        if not torch.cuda.is_available():
            parser.error(
                "there is no GPU that torch can use; --dry_run runs all parts small without one"
            )
    options.output.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    found = {}
    for part in options.parts:
        limit = until - time.monotonic()
        if not options.dry_run:
            limit = min(limit, PARTS[part])
        if limit <= 0:
            print(f"{part}: no time is left", flush=True)
            continue
        found[part] = run_part(part, options.output, limit, dry=options.dry_run)
        print(f"{part}: {found[part]['state']}, {found[part]['seconds']} s", flush=True)
    (options.output / "summary.md").write_text(summary(found) + "\n", encoding="utf-8")
    print(table(found))
    return 0 if len(found) == len(options.parts) and all(map(is_sound, found.values())) else 1


if __name__ == "__main__":
    raise SystemExit(main())
