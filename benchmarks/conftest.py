"""Fixtures that time the package beside its peers, and the table at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.results import Row, Run, command
from benchmarks.timing import Call, Interleaved
from benchmarks.tools.gpu_parts.timing import device_seconds

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_ROWS: list[Row] = []


@pytest.fixture
def note(request) -> Callable[..., Row]:
    """note(case, ours, peer, unit=, remark=): a row of the table that has the benchmark's name."""
    file = Path(request.node.path)
    table = f"{file.parent.name}/{file.stem.removeprefix('test_')}"

    def write(case: str, ours: float, peer: float | None, unit: str = "s", remark: str = "") -> Row:
        row = Row(table, case, peer, ours, unit, remark)
        _ROWS.append(row)
        return row

    return write


@pytest.fixture
def interleaved(benchmark) -> Callable[..., dict[str, float]]:
    """interleaved(calls, rounds=, repeats=, warm_up=): median seconds of each call, by name.

    The first call's are handed to pytest-benchmark. warm_up: small calls in place of long ones.
    """

    def run(
        calls: Mapping[str, Call],
        *,
        rounds: int,
        repeats: int = 1,
        warm_up: Mapping[str, Call] | None = None,
    ) -> dict[str, float]:
        timed = Interleaved(calls, repeats)
        timed.warm_up(warm_up)
        first, *others = calls
        benchmark.pedantic(
            timed.time,
            args=(first,),
            setup=lambda: [timed.time(name) for name in others] and None,
            rounds=rounds,
            iterations=1,
        )
        medians = timed.medians()
        benchmark.extra_info.update(median_seconds=medians)
        return medians

    return run


@pytest.fixture
def compare(interleaved, note) -> Callable[..., Row]:
    """compare(case, ours, peer, rounds=, repeats=): a row of two calls' medians."""

    def run(case: str, ours: Call, peer: Call, *, rounds: int, repeats: int = 1) -> Row:
        medians = interleaved({"ours": ours, "peer": peer}, rounds=rounds, repeats=repeats)
        return note(case, medians["ours"], medians["peer"])

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


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--rows", type=Path, help="a JSON file of the run, for python -m benchmarks report --add"
    )
    parser.addoption("--reranker", help="directory of a reranker whose NDCG@10 is measured")
    parser.addoption("--lists", help="the lists that it is measured on")


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
    options = terminalreporter.config
    run = Run.here(command("pytest", *options.invocation_params.args), _ROWS)
    if options.option.rows:
        run.write(options.option.rows)
    terminalreporter.section("beside sentence-transformers, medians of interleaved runs")
    where = f" on {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    terminalreporter.write_line(run.describe() + where)
    for line in run.table():
        terminalreporter.write_line(line)
