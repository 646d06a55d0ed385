"""What callbacks are told, and the signals that end a run early."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rerank_fast.training.trainer import Trainer


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Names and their values: train_begin; step_end; log (the row of the log); evaluate (the metrics);
    save (path of the checkpoint); train_end (the result's metrics).
    """

    name: Literal["train_begin", "step_end", "log", "evaluate", "save", "train_end"]
    step: int
    trainer: Trainer
    values: Mapping[str, Any] = field(default_factory=dict)


# A plain function that gets every event, in every process; trainer.stop() in it ends the run after
# this step.
Callback = Callable[[Event], None]


class TrainingInterrupted(SystemExit):
    """SIGTERM or SIGINT: the checkpoint holds everything. Uncaught, it ends the process with exit
    code 0.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(0)
        self.checkpoint = checkpoint


class Signals:
    """SIGTERM and SIGINT as a flag to be read between steps. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.came = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.came = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
