"""Interleaved timing of the package and its peer, and the table at the end of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.tools.gpu_parts.timing import device_seconds

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
    """compare(case, ours, peer, rounds, repeats): times both alternately, hands ours to
    pytest-benchmark, notes the ratio.

    One after the other in every round, so that whatever else slows the machine slows both alike.
    Each is called `repeats` times in a row and its mean taken: a call of some microseconds is not
    timed by how cold the other one left the caches.
    """

    def run(
        case: str,
        ours: Callable[[], object],
        peer: Callable[[], object],
        *,
        rounds: int,
        repeats: int = 1,
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
            lambda: timed("ours", ours),
            setup=lambda: timed("peer", peer),
            rounds=rounds,
            iterations=1,
        )
        row = Row(case, statistics.median(times["peer"]), statistics.median(times["ours"]))
        benchmark.extra_info.update(peer_median_seconds=row.peer, ratio=row.peer / row.ours)
        _ROWS.append(row)
        return row

    return run


@dataclass
class GpuRow:
    case: str
    seconds: dict[str, float]  # by what was timed: medians
    pairs_per_second: float
    bandwidth_share: float  # of the measured copy bandwidth


_GPU_ROWS: list[GpuRow] = []


def graphed(function: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph of one call: for kernels shorter than their launch from the
    host.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@pytest.fixture
def compare_on_gpu(benchmark) -> Callable[..., None]:
    """compare_on_gpu(case, ours, others, pairs, moved): device times of ours from a graph and from
    the host, and of the others; ours is handed to pytest-benchmark. pairs: preference pairs; moved:
    bytes that must be moved.
    """

    def run(
        case: str,
        ours: Callable[[], object],
        others: dict[str, Callable[[], object]],
        *,
        pairs: int,
        moved: int,
    ) -> None:
        replay = graphed(ours)
        seconds = {"graph": device_seconds(replay), "eager": device_seconds(ours)}
        seconds |= {name: device_seconds(other, rounds=7) for name, other in others.items()}
        source = torch.empty(2**28, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        bandwidth = 2 * source.numel() / device_seconds(lambda: target.copy_(source))
        row = GpuRow(case, seconds, pairs / seconds["graph"], moved / seconds["graph"] / bandwidth)
        benchmark.extra_info.update(seconds=seconds, copy_bytes_per_second=bandwidth)
        benchmark.pedantic(lambda: (replay(), torch.cuda.synchronize()), rounds=5, iterations=1)
        _GPU_ROWS.append(row)

    return run


def _write_gpu_rows(write_line: Callable[[str], None]) -> None:
    for row in _GPU_ROWS:
        times = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in row.seconds.items())
        write_line(
            f"{row.case:<50} us: {times}; {row.pairs_per_second:.3g} pairs/s, "
            f"{row.bandwidth_share:.2%} of the copy bandwidth"
        )


@pytest.fixture
def compare_memory() -> Callable[[str, int, int], None]:
    """compare_memory(case, ours, peer): bytes, for the same table."""
    return lambda case, ours, peer: _ROWS.append(Row(case, peer, ours, "MiB"))


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--rows", help="a JSON file that the table's rows are written to; see benchmarks/tables.py"
    )


def pytest_collection_modifyitems(config, items) -> None:
    """What takes minutes runs on request: pytest benchmarks -m slow."""
    if config.option.markexpr:
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: -m slow"))


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter) -> None:
    if _GPU_ROWS:
        terminalreporter.section(
            f"device times on {torch.cuda.get_device_name()}, medians, L2 flushed"
        )
        _write_gpu_rows(terminalreporter.write_line)
    if not _ROWS:
        return
    import sentence_transformers

    from rerank_fast.ops import cpu

    if path := terminalreporter.config.option.rows:
        Path(path).write_text(
            json.dumps([dataclasses.asdict(row) for row in _ROWS]), encoding="utf-8"
        )
    device = f"{platform.machine()}, {cpu.instruction_set() if cpu.available() else 'no kernels'}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    terminalreporter.section("beside sentence-transformers, medians of interleaved runs")
    terminalreporter.write_line(
        f"{time.strftime('%Y-%m-%d')}, {device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, sentence-transformers {sentence_transformers.__version__}"
    )
    terminalreporter.write_line(f"{'case':<66} {'peer':>10} {'ours':>10}     {'ratio':>8}")
    for row in _ROWS:
        ratio = f"{row.peer / row.ours:>7.1f}x"
        peer, ours = (x * 1e3 if row.unit == "ms" else x / 2**20 for x in (row.peer, row.ours))
        terminalreporter.write_line(
            f"{row.case:<66} {peer:>10.2f} {ours:>10.2f} {row.unit:<3} {ratio}"
        )
