"""Times of a GPU by its own events, and what a profile of a call says. Without a GPU there are
none.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]


def device_seconds(function: Call, *, rounds: int = 30) -> float:
    """Median device time of a call between two events, after a warm-up, each time with a flushed L2
    cache.
    """
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")  # larger than any L2 cache
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        flush.zero_()
        # The GPU is kept busy while the host enqueues what is timed, or the host's time is
        # measured.
        torch.cuda._sleep(2_000_000)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def kernel_seconds(function: Call, device: torch.device, *, rounds: int = 15) -> float | None:
    """device_seconds; without a GPU the call is made once and None comes back."""
    if device.type != "cuda":
        function()
        return None
    return device_seconds(function, rounds=rounds)


def loop_seconds(function: Call, device: torch.device, *, calls: int = 10) -> float | None:
    """Of a call among others that follow each other at once, host and device together.

    The fastest of three such loops, after a warm-up. None without a GPU, after one call.
    """
    if device.type != "cuda":
        function()
        return None
    for _ in range(2):
        function()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return min(times)


@dataclass
class Profile:
    """Of one call on a GPU."""

    launches: int
    copies: int
    busy_seconds: float  # in which the device ran anything
    seconds_by_name: dict[str, float]  # of kernels, most first
    launches_by_name: dict[str, int]


def profile(function: Call, device: torch.device) -> Profile | None:
    """What a call launches, after a warm-up; None without a GPU, after one call."""
    function()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        torch.cuda.synchronize()
    return _profile_of(profiler.events())


def _profile_of(events: Any) -> Profile:
    on_device = [
        one
        for one in events
        if one.device_type == torch.autograd.DeviceType.CUDA and not one.is_user_annotation
    ]
    kernels = [one for one in on_device if not one.name.startswith(("Memcpy", "Memset"))]
    seconds: Counter[str] = Counter()
    for one in kernels:
        seconds[one.name] += one.time_range.elapsed_us() / 1e6
    busy, last = 0.0, float("-inf")
    for one in sorted(on_device, key=lambda one: one.time_range.start):
        busy += max(one.time_range.end - max(one.time_range.start, last), 0.0)
        last = max(last, one.time_range.end)
    return Profile(
        launches=len(kernels),
        copies=len(on_device) - len(kernels),
        busy_seconds=busy / 1e6,
        seconds_by_name=dict(seconds.most_common()),
        launches_by_name=dict(Counter(one.name for one in kernels).most_common()),
    )


class EventClock:
    """Device time by phase, for whoever says where one begins; from event to event, idle time
    included.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = []

    def begin(self, phase: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))

    def seconds(self) -> dict[str, float]:
        torch.cuda.synchronize()
        found: Counter[str] = Counter()
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            found[phase] += start.elapsed_time(end) / 1e3
        found.pop("", None)
        return dict(found)


class Unobserved:
    """Where phases are of no interest."""

    def begin(self, phase: str) -> None: ...
