"""Interleaved timing of the package and its peer, and the table at the end of a run."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass
class Row:
    case: str
    peer: float  # median seconds, or bytes
    ours: float
    unit: str = "ms"  # what the table shows: ms or MiB


_ROWS: list[Row] = []


@pytest.fixture
def compare(benchmark) -> Callable[..., Row]:
    """compare(case, ours, peer, rounds, repeats): times both alternately, hands ours to pytest-benchmark, notes the
    ratio.

    One after the other in every round, so that whatever else slows the machine slows both alike. Each is called
    `repeats` times in a row and its mean taken: a call of some microseconds is not timed by how cold the other one
    left the caches.
    """

    def run(
        case: str, ours: Callable[[], object], peer: Callable[[], object], *, rounds: int, repeats: int = 1
    ) -> Row:
        ours(), peer()  # compilation, caches, first allocations
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        times: dict[str, list[float]] = {"peer": [], "ours": []}

        def timed(name: str, function: Callable[[], object]) -> None:
            started = time.perf_counter()
            for _ in range(repeats):
                function()
            synchronize()
            times[name].append((time.perf_counter() - started) / repeats)

        benchmark.pedantic(
            lambda: timed("ours", ours), setup=lambda: timed("peer", peer), rounds=rounds, iterations=1
        )
        row = Row(case, statistics.median(times["peer"]), statistics.median(times["ours"]))
        benchmark.extra_info.update(peer_median_seconds=row.peer, ratio=row.peer / row.ours)
        _ROWS.append(row)
        return row

    return run


@pytest.fixture
def compare_memory() -> Callable[[str, int, int], None]:
    """compare_memory(case, ours, peer): bytes, for the same table."""
    return lambda case, ours, peer: _ROWS.append(Row(case, peer, ours, "MiB"))


def pytest_collection_modifyitems(config, items) -> None:
    """What takes minutes runs on request: pytest benchmarks -m slow."""
    if config.option.markexpr:
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: -m slow"))


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter) -> None:
    if not _ROWS:
        return
    import sentence_transformers

    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    )
    terminalreporter.section("beside sentence-transformers, medians of interleaved runs")
    terminalreporter.write_line(
        f"{time.strftime('%Y-%m-%d')}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"sentence-transformers {sentence_transformers.__version__}"
    )
    terminalreporter.write_line(f"{'case':<66} {'peer':>10} {'ours':>10}     {'ratio':>8}")
    for row in _ROWS:
        ratio = f"{row.peer / row.ours:>7.1f}x"
        peer, ours = (x * 1e3 if row.unit == "ms" else x / 2**20 for x in (row.peer, row.ours))
        terminalreporter.write_line(f"{row.case:<66} {peer:>10.2f} {ours:>10.2f} {row.unit:<3} {ratio}")
