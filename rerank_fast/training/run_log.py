"""The log of a run: JSON lines always, trackers of Accelerate by name, and the rates since the last
line.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import tracking
from accelerate.utils import is_tensorboard_available

from rerank_fast.data.output_errors import writing

LOG_FILE = "train_log.jsonl"


class RunLog:
    """Rows of a run, from the process that writes.

    Args:
        directory: of the run; train_log.jsonl in it grows by a line a row.
        trackers: names that Accelerate knows: tensorboard, wandb, mlflow and others.
        settings: of the run, shown by the trackers.
        position: bytes of the log that belong to the run; what a resumed run has beyond them is cut
            off.
        step: that the run goes on from, 0 for a fresh one; TensorBoard hides what it has beyond.

    Raises:
        ValueError: a tracker that Accelerate doesn't know, or whose package is missing.
    """

    def __init__(
        self,
        directory: Path,
        trackers: Sequence[str],
        settings: Mapping[str, Any],
        *,
        position: int = 0,
        step: int = 0,
    ) -> None:
        self._file = directory / LOG_FILE
        if position and self._file.is_file():
            os.truncate(self._file, min(position, self.position))  # who shortened it gets no gap
        self._trackers = []
        for name in check_trackers(trackers):
            kind = tracking.LOGGER_TYPE_TO_CLASS[name]
            where: dict[str, Any] = (
                {"logging_dir": directory / name} if kind.requires_logging_directory else {}
            )
            if name == "wandb":
                where["dir"] = str(directory)
            if name == "tensorboard":
                where["purge_step"] = step + 1
            tracker = kind(directory.resolve().name, **where)
            tracker.start()
            if name != "tensorboard":  # there a table of settings is a run of its own
                tracker.store_init_configuration(dict(settings))
            self._trackers.append(tracker)

    def write(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Add a row of the step.

        Raises:
            ValueError: the file can't be written, as on a full disk; names it.
        """
        # JSON has no NaN and no infinity, as of the gradient of a step that fp16 left out.
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"step": step, "epoch": epoch, **known}
        with writing(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._file.stat().st_size if self._file.is_file() else 0

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> Sequence[str]:
    """The names, where all of them can be used.

    Raises:
        ValueError: one that Accelerate doesn't know, or whose package is missing.
    """
    known = {str(name) for name in tracking.LOGGER_TYPE_TO_CLASS}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown tracker {name!r}; there are {', '.join(sorted(known))}")
        available = (
            is_tensorboard_available()
            if name == "tensorboard"
            else name in map(str, tracking.get_available_trackers())
        )
        if not available:
            raise ValueError(
                f"tracker {name!r} needs its package: pip install {name.replace('_', '-')}"
            )
    return names


@dataclass
class Rates:
    """What has been worked off since the last line of the log."""

    started: float = field(default_factory=time.perf_counter)
    pairs: int = 0  # of all processes, and documents of other lists among them
    negatives: int = 0
    waited: float = 0.0  # seconds for data
    scored: int = 0  # pairs of this process, and how many of them were not run again
    skipped: int = 0
    truncated: int = 0  # pairs of this process
    tokens: int = 0  # of this process, and with the padding they went in
    padded_tokens: int = 0

    def row(self) -> dict[str, float]:
        """pairs_per_second; shares of the time waited for data, of the padding, of pairs not run
        again and of truncated ones; and in_batch_negatives, where there are any, as a number."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            "pairs_per_second": self.pairs / seconds,
            **({"in_batch_negatives": self.negatives} if self.negatives else {}),
            "wait_share": self.waited / seconds,
            "padding_share": 1 - self.tokens / max(self.padded_tokens, self.tokens, 1),
            "skipped_share": self.skipped / max(self.scored, 1),
            "truncated_share": self.truncated / max(self.scored, 1),
        }
