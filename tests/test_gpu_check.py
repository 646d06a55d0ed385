"""The check for the day that a GPU is there: all of it runs small without one, and claims no
time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.tools import gpu_check
from benchmarks.tools.gpu_parts import sanitizer, syncs, timing
from benchmarks.tools.gpu_parts.results import Results


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Its directory and what it printed."""
    pytest.importorskip("triton")
    pytest.importorskip("sentence_transformers")
    output = tmp_path_factory.mktemp("gpu_check") / "new"
    command = [sys.executable, "-m", gpu_check.__name__, "--dry_run", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    logs = "\n".join(file.read_text()[-2000:] for file in output.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return output, done.stdout


@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_a_dry_run_runs_every_part_and_measures_nothing(part: str, dry_run: tuple[Path, str]):
    output, printed = dry_run
    content = json.loads((output / f"{part}.json").read_text())
    assert content["state"] == "ended"
    assert content["device"] == "none: a dry run"
    assert content["rows"]
    for row in content["rows"]:
        measured = {key: value for key, value in row.items() if key.startswith("measured_")}
        assert not any(value is not None for value in measured.values()), row
        assert "left_out" not in row or "flash" in row["what"] or "varlen" in row["what"], row
    assert f"| {part} | ended |" in printed
    assert f"## {part}: ended" in (output / "summary.md").read_text()


@pytest.mark.parametrize(
    ("part", "count"),
    [("steps", 15), ("kernels", 30), ("models", 5), ("syncs", 4)],
)
def test_a_dry_run_leaves_out_no_row(part: str, count: int, dry_run: tuple[Path, str]):
    rows = json.loads((dry_run[0] / f"{part}.json").read_text())["rows"]
    assert len(rows) >= count
    assert len({row["what"] for row in rows}) == len(rows)


def _hangs(results: Results) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    results.add("before", child=child.pid)
    time.sleep(60)


def _breaks(results: Results) -> None:
    results.add("before")
    raise RuntimeError("a GPU was lost\nand more")


def _dies(results: Results) -> None:
    results.add("before")
    os._exit(3)


def _claims(results: Results) -> None:
    results.add("a claim", measured_seconds=1.0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a dry run forks")
@pytest.mark.parametrize(
    ("run", "state"),
    [
        (_hangs, "stopped at its limit of 1 s"),
        (_breaks, "failed: RuntimeError: a GPU was lost"),
        (_dies, "ended by itself with 3"),
        (
            _claims,
            "failed: ValueError: a dry run measures nothing, got measured_seconds of a claim",
        ),
    ],
)
def test_a_part_that_goes_wrong_leaves_what_it_had(
    run: Any,
    state: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    module = ModuleType("wrong")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"{gpu_check._ROOMS}.wrong", module)
    content = gpu_check.run_part("wrong", tmp_path, 1.0, dry=True)
    assert content["state"] == state
    assert not gpu_check.is_sound(content)
    rows = json.loads((tmp_path / "wrong.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ([] if run is _claims else ["before"])
    for pid in (row["child"] for row in rows if "child" in row):
        assert _is_gone(pid)


def _is_gone(pid: int) -> bool:
    """Or has ended and waits for nobody."""
    try:
        return re.search(r"\) [ZX] ", Path(f"/proc/{pid}/stat").read_text()) is not None
    except FileNotFoundError:
        return True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        gpu_check.main(["--output", str(tmp_path / "new")])
    assert "there is no GPU that torch can use; --dry_run" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("rows", "sound"),
    [
        ([], True),
        ([{"what": "a", "sound": True}, {"what": "b"}], True),
        ([{"what": "a", "sound": False}], False),
        ([{"what": "a", "failures": ["a test"]}], False),
    ],
)
def test_one_unsound_row_is_enough(rows: list[dict[str, Any]], sound: bool):
    assert gpu_check.is_sound({"state": "ended", "rows": rows}) is sound
    assert not gpu_check.is_sound({"state": "stopped", "rows": rows})


@pytest.mark.parametrize(
    ("summaries", "sound"),
    [
        (["ERROR SUMMARY: 0 errors"], True),
        (["RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"], True),
        (["ERROR SUMMARY: 0 errors", "ERROR SUMMARY: 2 errors"], False),
        (["ERROR SUMMARY: 10 errors"], False),
        ([], False),
    ],
)
def test_what_the_sanitizer_says(summaries: list[str], sound: bool):
    assert sanitizer._is_sound(summaries) is sound


def test_waits_are_counted_by_their_line(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: calls.append(str(mode)))

    def call() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = syncs.waits(call, torch.device("cuda"))
    assert list((found or {}).values()) == [2]
    assert next(iter(found or {})).startswith("tests/test_gpu_check.py:")
    assert calls == ["warn", "0"]


def test_a_profile_counts_launches_and_the_time_of_any_kernel():
    def event(
        name: str, start: float, end: float, *, on: str = "CUDA", annotation: bool = False
    ) -> Any:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        kind = getattr(torch.autograd.DeviceType, on)
        return SimpleNamespace(
            name=name, time_range=span, device_type=kind, is_user_annotation=annotation
        )

    found = timing._profile_of(
        [
            event("aten::mm", 0, 900, on="CPU"),
            event("step", 0, 900, annotation=True),
            event("gemm", 10, 20),
            event("norm", 15, 25),  # beside it, on another stream
            event("gemm", 30, 40),
            event("Memcpy HtoD", 50, 55),
        ]
    )
    assert (found.launches, found.copies) == (3, 1)
    assert found.busy_seconds == pytest.approx(30e-6)
    assert found.launches_by_name == {"gemm": 2, "norm": 1}
    assert found.seconds_by_name == pytest.approx({"gemm": 20e-6, "norm": 10e-6})


class FakeEvent:
    """Recorded on a clock that every call and every mark moves on by a millisecond."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now = FakeEvent.now + 1.0

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("clock")
def test_a_loop_is_timed_by_events_around_all_its_calls():
    def call() -> None:
        FakeEvent.now += 5.0

    seconds = timing.loop_seconds(call, torch.device("cuda"), calls=4)
    assert seconds == pytest.approx((4 * 5 + 1) / 4 / 1e3)
    assert timing.loop_seconds(call, torch.device("cpu")) is None


@pytest.mark.usefixtures("clock")
def test_phases_that_come_again_are_added_up():
    phases = timing.EventClock()
    for phase, milliseconds in (("forward", 3), ("backward", 7), ("forward", 1), ("", 50)):
        phases.begin(phase)
        FakeEvent.now += milliseconds
    phases.begin("")
    assert phases.seconds() == pytest.approx({"forward": 6e-3, "backward": 8e-3})
