"""The one way in which benchmarks time: calls in turn, medians over rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]


@dataclass
class Interleaved:
    """Calls that are timed one after the other in every round, so that whatever else slows the
    machine slows all alike.

    Each is called `repeats` times in a row and the mean taken: a call of some microseconds is not
    timed by how cold the others left the caches.
    """

    calls: Mapping[str, Call]
    repeats: int = 1
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each round, by call

    def warm_up(self, instead: Mapping[str, Call] | None = None) -> None:
        """Compilation, caches, first allocations: every call once, or what stands for it.

        Args:
            instead: of calls that take many seconds, a small one that does the same.
        """
        for name, call in self.calls.items():
            (instead or {}).get(name, call)()

    def time(self, name: str) -> None:
        """One round of one of the calls."""
        _synchronize()
        started = time.perf_counter()
        for _ in range(self.repeats):
            self.calls[name]()
        _synchronize()
        taken = (time.perf_counter() - started) / self.repeats
        self.seconds.setdefault(name, []).append(taken)

    def run(self, rounds: int) -> dict[str, float]:
        """Rounds of all calls, in their order. Returns medians()."""
        for _ in range(rounds):
            for name in self.calls:
                self.time(name)
        return self.medians()

    def medians(self) -> dict[str, float]:
        """Of a call: the median of its rounds' seconds, by name."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
