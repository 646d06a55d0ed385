"""What a training step takes: peak memory and time of direct, checkpointing, cached and both; the
loop's own share.

    python -m benchmarks.steps.training_memory batches     # 16 lists of 12, beside the peer
    python -m benchmarks.steps.training_memory long        # 16 of 128, which need 100 GiB of it
    python -m benchmarks.steps.training_memory documents   # 1 list of 8, 32, 128 or 512
    python -m benchmarks.steps.training_memory objectives  # the same cached, of every objective
    python -m benchmarks.steps.training_memory micro       # by the tokens of a micro-batch
    python -m benchmarks.steps.training_memory loop        # outside forward, backward, optimizer

Every row is a process of its own: its peak is the resident set's (VmHWM), less what is resident
once the model, gradients, optimizer state and oneDNN's kernels are there. MiniLM-L6 in its fastest
precision, pairs of 20 to 256 tokens. Nothing else should use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import add_rows, make_parser
from benchmarks.results import Row, Run
from benchmarks.timing import Interleaved
from benchmarks.workload import marco_like_lists, words_like_marco
from rerank_fast.objectives import NAMES

DOCUMENTS = (8, 32, 128, 512)
PEER = "sentence-transformers"
MODES: dict[str, dict[str, Any]] = {
    "direct": {"gradient_cache": "off"},
    "checkpointing": {"gradient_cache": "off", "gradient_checkpointing": True},
    "cached": {"gradient_cache": "on"},
    "cached, checkpointing": {"gradient_cache": "on", "gradient_checkpointing": True},
}


# Without the memory that glibc keeps after it is freed.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072"}


def _bytes(file: str, key: str) -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def resident(key: str) -> int:
    """Bytes that are resident now (VmRSS), or were at most since the last reset (VmHWM)."""
    return _bytes("/proc/self/status", key)


def _lists(num_lists: int, documents: int, words: int | None) -> list[dict]:
    generator = np.random.default_rng(0)
    return [
        {
            "query": words_like_marco(generator, 7),
            "docs": [words_like_marco(generator, words) for _ in range(documents)],
            "labels": [1, *[0] * (documents - 1)],
        }
        for _ in range(num_lists)
    ]


def _measure(case: dict[str, Any]) -> dict[str, float]:
    """In the process of a row."""
    from benchmarks.steps.training import make_peer_step, make_step

    # More than there is raises an error: without the limit the system would kill a process of its
    # choice.
    available = _bytes("/proc/meminfo", "MemAvailable")
    resource.setrlimit(resource.RLIMIT_DATA, (available, available))
    lists = _lists(case["lists"], case["documents"], case.get("words"))
    with tempfile.TemporaryDirectory() as output:
        if case["mode"].startswith(PEER):
            checkpointing = case["mode"].endswith("checkpointing")
            step = make_peer_step(lists, gradient_checkpointing=checkpointing)
        else:
            step = make_step(lists, output, **MODES[case["mode"]], **case.get("settings", {}))
        step.small()  # gradients and the optimizer's state are there now
        # And the kernels that oneDNN compiles for every number of rows and keeps: they are not the
        # step's.
        step.run()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = resident("VmRSS")
        seconds = Interleaved({"step": step.run}).run(1)["step"]
    return {"mib": (resident("VmHWM") - before) / 2**20, "seconds": seconds}


def _rows(cases: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, float] | None]]:
    """Print each case as it is measured; None where it does not fit the memory."""
    found: list[tuple[dict[str, Any], dict[str, float] | None]] = []
    print(f"{'mode':<40} {'lists':>5} {'docs':>5} {'peak MiB':>9} {'seconds':>8} {'pairs/s':>8}")
    for case in cases:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.steps.training_memory", "--case", json.dumps(case)],
            env={**os.environ, **_ENVIRONMENT},
            capture_output=True,
            text=True,
            check=False,
        )
        settings = case.get("settings", {})
        name = ", ".join([case["mode"], *(str(value) for value in settings.values())])
        start = f"{name:<40} {case['lists']:>5} {case['documents']:>5}"
        if done.returncode:
            if "can't allocate memory" not in done.stderr:
                raise SystemExit(done.stderr)
            print(
                f"{start} does not fit in the "
                f"{_bytes('/proc/meminfo', 'MemAvailable') / 2**30:.0f} GiB free"
            )
            found.append((case, None))
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        rate = case["lists"] * case["documents"] / row["seconds"]
        print(f"{start} {row['mib']:>9.0f} {row['seconds']:>8.2f} {rate:>8.1f}", flush=True)
        found.append((case, row))
    return found


def compared(found: list[tuple[dict[str, Any], dict[str, float] | None]]) -> list[Row]:
    """Of the documents' table: each of ours that fits beside its peer, which may not."""

    def key(case: dict[str, Any]) -> tuple[str, int, int, str]:
        objective = case.get("settings", {}).get("objective", "")
        return case["mode"], case["lists"], case["documents"], objective

    values = {key(case): row for case, row in found}
    rows = []
    for (mode, lists, documents, objective), row in values.items():
        if mode not in MODES or row is None:
            continue
        if objective:
            other, name = (
                (mode, lists, documents, "lambda_loss"),
                f", {objective}, peer lambda_loss",
            )
        elif (PEER, lists, documents, "") in values:
            name = ", both with checkpointing" if mode.endswith("checkpointing") else ""
            other = (f"{PEER}, checkpointing" if name else PEER, lists, documents, "")
        else:
            name = ", peer off"
            other = ("direct", lists, documents, "")
        if other not in values or other == (mode, lists, documents, objective):
            continue
        if objective and documents < max(at[2] for at in values if at[3] == objective):
            continue  # the longest list says it
        peer = values[other]
        cache = MODES[mode]["gradient_cache"]
        plural = "list" if lists == 1 else "lists"
        case = f"{lists} {plural} of {documents}, gradient_cache {cache}{name}"
        rows.append(_row(case, row["mib"] * 2**20, peer and peer["mib"] * 2**20, "B"))
        if not objective and not name.endswith("off"):
            pairs = lists * documents
            rate = peer and pairs / peer["seconds"]
            rows.append(_row(f"{case}, speed", pairs / row["seconds"], rate, "pairs/s"))
    return rows


def _row(case: str, ours: float, peer: float | None, unit: str) -> Row:
    return Row("steps/training_memory", case, peer, ours, unit)


def _loop(steps: int) -> None:
    """The share of a run that is neither forward, backward nor optimizer: logging, data, progress,
    checks.
    """
    from rerank_fast import Trainer, TrainingConfig
    from rerank_fast.demo import encoder_directory

    inside = 0.0

    class Timed(Trainer):
        def step(self, *arguments: Any, **options: Any) -> Any:
            nonlocal inside
            started = time.perf_counter()
            result = super().step(*arguments, **options)
            inside += time.perf_counter() - started
            return result

    with tempfile.TemporaryDirectory() as output:
        config = TrainingConfig(
            output=output, max_length=256, max_steps=steps, batch_size=4, logging_steps=1
        )
        times: list[tuple[float, float]] = []
        told = [lambda event: times.append((time.perf_counter(), inside))]
        lists = marco_like_lists(64)
        Timed(encoder_directory(), lists, config=config, callbacks=told).train()
    # From the end of the first step to that of the last one: neither the start nor the final save.
    ends = times[2::2]
    whole, within = ends[-1][0] - ends[0][0], ends[-1][1] - ends[0][1]
    count = len(ends) - 1
    print(
        f"{count} steps of {within / count * 1e3:.0f} ms, a log line each: "
        f"{1 - within / whole:.2%} outside of them"
    )


def _cases(part: str) -> list[dict[str, Any]]:
    if part in ("batches", "long"):
        peers = [PEER, f"{PEER}, checkpointing"]
        documents = 12 if part == "batches" else 128
        return [{"mode": mode, "lists": 16, "documents": documents} for mode in [*MODES, *peers]]
    # Micro-batches that even 8 documents fill: what grows after that grows with the list.
    small = {"max_tokens_per_microbatch": 512}
    if part == "documents":
        return [
            {"mode": mode, "lists": 1, "documents": documents, "settings": small}
            for mode in ("cached", "direct")
            for documents in DOCUMENTS
        ]
    if part == "objectives":  # short documents: what grows by pairs of them is the objective's
        return [
            {
                "mode": "cached",
                "lists": 1,
                "documents": documents,
                "words": 12,
                "settings": {"objective": name, **small},
            }
            for name in NAMES
            for documents in DOCUMENTS
        ]
    budgets = (512, 1024, 2048, 4096, 8192, 16384)
    return [
        {
            "mode": "cached",
            "lists": 8,
            "documents": 24,
            "settings": {"max_tokens_per_microbatch": tokens},
        }
        for tokens in budgets
    ]


def main() -> None:
    parser = make_parser(__name__)
    add_rows(parser)
    parser.add_argument(
        "part",
        nargs="?",
        default="batches",
        choices=("batches", "long", "documents", "objectives", "micro", "loop"),
    )
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="rows whose mode begins with this")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(_measure(json.loads(options.case))))
        return
    if options.part == "loop":
        _loop(steps=12)
        return
    cases = _cases(options.part)
    found = _rows([case for case in cases if case["mode"].startswith(options.only)])
    Run.of_script(options.rows, "benchmarks.steps.training_memory", compared(found))


if __name__ == "__main__":
    main()
