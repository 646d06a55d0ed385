"""What a training step takes: peak memory and time of direct, checkpointing, cached and both; the
loop's own share.

    python -m benchmarks.training_memory batches     # 16 lists of 12 documents, beside
    sentence-transformers python -m benchmarks.training_memory long        # 16 of 128; without
    checkpointing the peer needs some 100 GiB python -m benchmarks.training_memory documents   #
    cached and direct, 1 list of 8, 32, 128 or 512 python -m benchmarks.training_memory micro
    # tokens a micro-batch python -m benchmarks.training_memory loop        # time outside forward,
    backward and optimizer

Every row is a process of its own: its peak is the resident set's (VmHWM), less what is resident
once the model, gradients, optimizer state and oneDNN's kernels are there. MiniLM-L6, bf16, pairs of
20 to 256 tokens. Nothing else should use the machine.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

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


def _resident(key: str) -> int:
    """Bytes that are resident now (VmRSS), or were at most since the last reset (VmHWM)."""
    return _bytes("/proc/self/status", key)


def _lists(num_lists: int, documents: int) -> list[dict]:
    from benchmarks.workload import words_like_marco

    generator = np.random.default_rng(0)
    return [
        {
            "query": words_like_marco(generator, 7),
            "docs": [words_like_marco(generator) for _ in range(documents)],
            "labels": [1, *[0] * (documents - 1)],
        }
        for _ in range(num_lists)
    ]


def _measure(case: dict[str, Any]) -> dict[str, float]:
    """In the process of a row."""
    from benchmarks.workload import encoder, make_peer_step
    from rerank_fast import Trainer, TrainingConfig
    from rerank_fast.data import tokenize_lists

    # More than there is raises an error: without the limit the system would kill a process of its
    # choice.
    available = _bytes("/proc/meminfo", "MemAvailable")
    resource.setrlimit(resource.RLIMIT_DATA, (available, available))
    lists, small = _lists(case["lists"], case["documents"]), _lists(1, 2)
    with tempfile.TemporaryDirectory() as output:
        if case["mode"].startswith("sentence-transformers"):
            checkpointing = case["mode"].endswith("checkpointing")
            step = make_peer_step(
                small, lists, mini_batch_size=16, gradient_checkpointing=checkpointing
            )
        else:
            settings = MODES[case["mode"]] | case.get("settings", {})
            config = TrainingConfig(
                output=output,
                max_length=256,
                batch_size=len(lists),
                show_progress_bar=False,
                **settings,
            )
            trainer = Trainer(encoder(), lists, config=config)
            trainer.model.train()
            batch = next(trainer.batches())
            little = replace(batch, lists=tokenize_lists(small, trainer.model))
            step = lambda which: trainer.step((little, batch)[which])  # noqa: E731
        step(0)  # gradients and the optimizer's state are there now
        # And the kernels that oneDNN compiles for every number of rows and keeps: they are not the
        # step's.
        step(1)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = _resident("VmRSS")
        started = time.perf_counter()
        step(1)
        seconds = time.perf_counter() - started
    return {"mib": (_resident("VmHWM") - before) / 2**20, "seconds": seconds}


def _rows(cases: list[dict[str, Any]]) -> None:
    print(f"{'mode':<40} {'lists':>5} {'docs':>5} {'peak MiB':>9} {'seconds':>8} {'pairs/s':>8}")
    for case in cases:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.training_memory", "--case", json.dumps(case)],
            env={**os.environ, **_ENVIRONMENT},
            capture_output=True,
            text=True,
            check=False,
        )
        name = case["mode"] + "".join(
            f", {value} tokens" for value in case.get("settings", {}).values()
        )
        start = f"{name:<40} {case['lists']:>5} {case['documents']:>5}"
        if done.returncode:
            if "can't allocate memory" not in done.stderr:
                raise SystemExit(done.stderr)
            print(
                f"{start} does not fit in the "
                f"{_bytes('/proc/meminfo', 'MemAvailable') / 2**30:.0f} GiB free"
            )
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        rate = case["lists"] * case["documents"] / row["seconds"]
        print(f"{start} {row['mib']:>9.0f} {row['seconds']:>8.2f} {rate:>8.1f}", flush=True)


def _loop(steps: int) -> None:
    """The share of a run that is neither forward, backward nor optimizer: logging, data, progress,
    checks.
    """
    from benchmarks.workload import encoder, marco_like_lists
    from rerank_fast import Trainer, TrainingConfig

    with tempfile.TemporaryDirectory() as output:
        config = TrainingConfig(
            output=output, max_length=256, max_steps=steps, batch_size=4, logging_steps=1
        )
        trainer = Trainer(encoder(), marco_like_lists(64), config=config)
        inner, inside = trainer.step, [0.0]

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = inner(*arguments, **options)
            inside[0] += time.perf_counter() - started
            return result

        trainer.step = timed  # type: ignore[method-assign]
        times: list[tuple[float, float]] = []
        trainer.callbacks = [lambda event: times.append((time.perf_counter(), inside[0]))]
        trainer.train()
    # From the end of the first step to that of the last one: neither the start nor the final save.
    ends = times[2::2]
    whole, within = ends[-1][0] - ends[0][0], ends[-1][1] - ends[0][1]
    count = len(ends) - 1
    print(
        f"{count} steps of {within / count * 1e3:.0f} ms, a log line each: "
        f"{1 - within / whole:.2%} outside of them"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "part", nargs="?", choices=("batches", "long", "documents", "micro", "loop")
    )
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--only", default=None, help="rows whose mode begins with this")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(_measure(json.loads(options.case))))
        return
    peers = ["sentence-transformers", "sentence-transformers, checkpointing"]
    cases: list[dict[str, Any]] = []
    if options.part in ("batches", "long"):
        documents = 12 if options.part == "batches" else 128
        cases = [{"mode": mode, "lists": 16, "documents": documents} for mode in [*MODES, *peers]]
    elif options.part == "documents":
        # Micro-batches that even 8 documents fill: what grows after that grows with the list.
        cases = [
            {
                "mode": mode,
                "lists": 1,
                "documents": d,
                "settings": {"max_tokens_per_microbatch": 512},
            }
            for mode in ("cached", "direct")
            for d in (8, 32, 128, 512)
        ]
    elif options.part == "micro":
        cases = [
            {
                "mode": "cached",
                "lists": 8,
                "documents": 24,
                "settings": {"max_tokens_per_microbatch": tokens},
            }
            for tokens in (512, 1024, 2048, 4096, 8192, 16384)
        ]
    else:
        _loop(steps=12)
        return
    _rows([case for case in cases if options.only is None or case["mode"].startswith(options.only)])


if __name__ == "__main__":
    main()
