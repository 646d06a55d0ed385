"""Dropout off while a model scores, in however many threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class EvalMode:
    """Evaluation mode of one model from when its first thread scores until the last is done.

    Each of the model's modules then has the mode it had before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._trained: list[nn.Module] = []

    def __reduce__(self) -> tuple[type[EvalMode], tuple[()]]:
        return EvalMode, ()  # a copy of the model is scored by no thread yet

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        with self._lock:
            if not self._threads:
                self._trained = [module for module in model.modules() if module.training]
                _set(self._trained, training=False)
            self._threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    _set(self._trained, training=True)
                    self._trained = []


def _set(modules: list[nn.Module], *, training: bool) -> None:
    # Not by train(), which sets all modules below one and may be another's own.
    for module in modules:
        module.training = training
