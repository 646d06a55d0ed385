"""Interrupted runs go on where they stopped; other runs' files are left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rerank_fast.data import load_lists, mine_hard_negatives
from rerank_fast.data.mining.writing import ListWriter
from tests.data.mining.stubs import FixedCrossEncoder, by_query
from tests.full_disk import files_up_to

ROWS = [{"query": f"term{i} shared", "positive": f"term{i} positive"} for i in range(300)]
# Every third query has no negative: its only other term is its own.
ROWS = [row if i % 3 else {**row, "query": f"term{i}"} for i, row in enumerate(ROWS)]
CORPUS = [f"shared word{i} {'more ' * (i % 5)}" for i in range(40)]
OPTIONS: dict[str, Any] = {"num_negatives": 4, "show_progress_bar": False, "query_batch_size": 128}


class Stops(FixedCrossEncoder):
    """Raises in its n-th call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def predict(self, pairs: Any, **options: Any) -> Any:
        if len(self.batches) == self.calls:
            raise KeyboardInterrupt
        return super().predict(pairs, **options)


Stops.__qualname__ = FixedCrossEncoder.__qualname__  # the same model, as the settings see it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "lists.jsonl"
    mine_hard_negatives(ROWS, CORPUS, output=output, cross_encoder=FixedCrossEncoder(), **OPTIONS)
    content = output.read_bytes()
    assert content.count(b"\n") == 200
    return content


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_interrupted_run_goes_on(tmp_path: Path, whole: bytes, calls: int, suffix: str) -> None:
    output = tmp_path / f"lists{suffix}"
    with pytest.raises(KeyboardInterrupt):
        mine_hard_negatives(ROWS, CORPUS, output=output, cross_encoder=Stops(calls), **OPTIONS)
    assert output.exists() == (suffix == ".jsonl")  # a Parquet file is there whole or not at all
    teacher = FixedCrossEncoder()
    result = mine_hard_negatives(ROWS, CORPUS, output=output, cross_encoder=teacher, **OPTIONS)
    # Of five groups of 64 queries, those written are not scored again; the first's last query has
    # no list, which looks as if it had not been reached.
    assert len(teacher.batches) == {0: 5, 1: 5, 3: 2}[calls]
    assert result.lists == 200
    assert result.resumed_lists == {0: 0, 1: 42, 3: 128}[calls]
    assert (
        load_lists(output).to_list()
        == load_lists([json.loads(line) for line in whole.splitlines()]).to_list()
    )
    if suffix == ".jsonl":
        assert output.read_bytes() == whole
    assert {file.name for file in tmp_path.iterdir()} == {output.name, f"{output.name}.mining.json"}


@pytest.mark.parametrize("cut", [1, 2, 500, 4000])
def test_a_half_written_line_is_dropped(tmp_path: Path, whole: bytes, cut: int) -> None:
    output = tmp_path / "lists.jsonl"
    with pytest.raises(KeyboardInterrupt):
        mine_hard_negatives(ROWS, CORPUS, output=output, cross_encoder=Stops(2), **OPTIONS)
    os.truncate(output, output.stat().st_size - cut)
    mine_hard_negatives(ROWS, CORPUS, output=output, cross_encoder=FixedCrossEncoder(), **OPTIONS)
    assert output.read_bytes() == whole


_CHILD = """
import sys, time
from rerank_fast.data import mine_hard_negatives
from tests.data.mining import stubs, test_writing as case

class FixedCrossEncoder(stubs.FixedCrossEncoder):
    def predict(self, pairs, **options):
        if len(self.batches) == 2:
            time.sleep(60)
        return super().predict(pairs, **options)

mine_hard_negatives(
    case.ROWS, case.CORPUS, output=sys.argv[1], cross_encoder=FixedCrossEncoder(), **case.OPTIONS
)
"""


def test_a_killed_process_loses_nothing_that_it_wrote(tmp_path: Path, whole: bytes) -> None:
    output = tmp_path / "lists.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(output)], cwd=Path(__file__).parents[3]
    )
    try:
        deadline = time.monotonic() + 60
        while not (output.exists() and output.read_bytes().count(b"\n") >= 85):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    teacher = FixedCrossEncoder()
    result = mine_hard_negatives(ROWS, CORPUS, output=output, cross_encoder=teacher, **OPTIONS)
    assert len(teacher.batches) == 3
    assert result.resumed_lists == 85
    assert output.read_bytes() == whole


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_complete_run_is_left_as_it_is(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"lists{suffix}"
    first = mine_hard_negatives(ROWS, CORPUS, output=output, **OPTIONS)
    before = output.stat().st_mtime_ns
    again = mine_hard_negatives(ROWS, CORPUS, output=output, **OPTIONS)
    assert output.stat().st_mtime_ns == before
    assert (first.lists, again.lists, again.resumed_lists) == (200, 200, 200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_negatives": 5}, "num_negatives 4 -> 5, range_max 5 -> 6"),
        ({"seed": 13}, "seed 12 -> 13"),
        ({"labels": "scores"}, "labels 'relevance' -> 'scores'"),
        ({"cross_encoder": FixedCrossEncoder()}, "cross_encoder None -> 'FixedCrossEncoder'"),
        ({"corpus": CORPUS[::-1]}, "corpus '"),
        ({"queries": ROWS[:-1]}, "queries '"),
        (
            {"queries": [ROWS[0], {**ROWS[1], "positive": CORPUS[0]}, *ROWS[2:]]},
            "corpus '.*queries '",
        ),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    output = tmp_path / "lists.jsonl"
    options = {"queries": ROWS, "corpus": CORPUS, "output": output, **OPTIONS}
    mine_hard_negatives(**options)
    content = output.read_bytes()
    with pytest.raises(ValueError, match=f"lists.jsonl was mined with other settings .*{message}"):
        mine_hard_negatives(**{**options, **changes})
    assert output.read_bytes() == content
    mine_hard_negatives(**{**options, **changes, "overwrite": True})
    assert output.read_bytes() != content


def test_what_does_not_decide_the_lists_may_change(tmp_path: Path, whole: bytes) -> None:
    output = tmp_path / "lists.jsonl"
    with pytest.raises(KeyboardInterrupt):
        mine_hard_negatives(ROWS, CORPUS, output=output, cross_encoder=Stops(2), **OPTIONS)
    options = {**OPTIONS, "batch_size": 8, "query_batch_size": 50}
    mine_hard_negatives(ROWS, CORPUS, output=output, cross_encoder=FixedCrossEncoder(), **options)
    assert output.read_bytes() == whole


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_of_another_hand_is_refused(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"lists{suffix}"
    output.write_text("precious\n")
    with pytest.raises(ValueError, match="no mining run wrote it"):
        mine_hard_negatives(ROWS, CORPUS, output=output, **OPTIONS)
    assert output.read_text() == "precious\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_complete_file_without_its_last_newline_keeps_its_last_list(tmp_path: Path) -> None:
    output = tmp_path / "lists.jsonl"
    mine_hard_negatives(ROWS, CORPUS, output=output, **OPTIONS)
    os.truncate(output, output.stat().st_size - 1)
    content = output.read_bytes()
    assert mine_hard_negatives(ROWS, CORPUS, output=output, **OPTIONS).lists == 200
    assert output.read_bytes() == content


@pytest.mark.parametrize("line", ["{", '{"query": "another"}', "[1]", '{"docs": []}'])
def test_an_edited_line_is_named(tmp_path: Path, line: str) -> None:
    output = tmp_path / "lists.jsonl"
    mine_hard_negatives(ROWS, CORPUS, output=output, **OPTIONS)
    lines = output.read_text().splitlines()
    output.write_text("\n".join([*lines[:7], line, *lines[8:], ""]))
    with pytest.raises(ValueError, match=r"lists.jsonl, line 8: not a list of this run"):
        mine_hard_negatives(ROWS, CORPUS, output=output, **OPTIONS)


def test_a_broken_state_is_named(tmp_path: Path) -> None:
    output = tmp_path / "lists.jsonl"
    mine_hard_negatives(ROWS, CORPUS, output=output, **OPTIONS)
    Path(f"{output}.mining.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"lists\.jsonl\.mining\.json is not the state of a mining run"
    ):
        mine_hard_negatives(ROWS, CORPUS, output=output, **OPTIONS)


def test_a_bad_score_late_in_the_run_keeps_what_came_before(tmp_path: Path, whole: bytes) -> None:
    class FixedCrossEncoder_(FixedCrossEncoder):
        def predict(self, pairs: Any, **options: Any) -> Any:
            scores = super().predict(pairs, **options)
            return scores if len(self.batches) < 4 else scores * float("nan")

    FixedCrossEncoder_.__qualname__ = FixedCrossEncoder.__qualname__
    output = tmp_path / "lists.jsonl"
    with pytest.raises(ValueError, match="not finite"):
        mine_hard_negatives(
            ROWS, CORPUS, output=output, cross_encoder=FixedCrossEncoder_(), **OPTIONS
        )
    assert len(by_query(output)) == 128
    assert whole.startswith(output.read_bytes())


def test_one_run_at_a_time_writes_an_output(tmp_path: Path, whole: bytes) -> None:
    output = tmp_path / "lists.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(output)], cwd=Path(__file__).parents[3]
    )
    try:
        deadline = time.monotonic() + 60
        while not (output.exists() and output.read_bytes().count(b"\n") >= 85):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = output.read_bytes()
        for options in ({}, {"overwrite": True}):
            with pytest.raises(
                ValueError, match=rf"lists\.jsonl is being written by process {child.pid} on "
            ):
                mine_hard_negatives(
                    ROWS,
                    CORPUS,
                    output=output,
                    cross_encoder=FixedCrossEncoder(),
                    **OPTIONS,
                    **options,
                )
        assert output.read_bytes() == before
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    mine_hard_negatives(ROWS, CORPUS, output=output, cross_encoder=FixedCrossEncoder(), **OPTIONS)
    assert output.read_bytes() == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "lists.jsonl",
        "lists.jsonl.mining.json",
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("size", [0, 300, 2000, 20_000])
def test_a_full_disk_is_one_line_and_what_was_written_stays(
    tmp_path: Path, whole: bytes, suffix: str, size: int
) -> None:
    """The lock's note, the state, the first lists or later ones do not fit."""
    output = tmp_path / f"lists{suffix}"
    lines = output if suffix == ".jsonl" else tmp_path / "lists.parquet.partial.jsonl"
    options = {"output": output, "cross_encoder": FixedCrossEncoder(), **OPTIONS}
    with (
        files_up_to(size),
        pytest.raises(ValueError, match=rf"can't write {tmp_path}/lists\S*: \w+") as error,
    ):
        mine_hard_negatives(ROWS, CORPUS, **options)
    assert "\n" not in str(error.value)
    written = lines.read_bytes() if lines.exists() else b""
    assert whole.startswith(written)
    assert written.count(b"\n") > 20 or size < 20_000
    result = mine_hard_negatives(ROWS, CORPUS, **options)
    assert (result.lists, result.resumed_lists) == (200, written.count(b"\n"))
    assert (
        load_lists(output).to_list()
        == load_lists([json.loads(line) for line in whole.splitlines()]).to_list()
    )


def test_a_full_disk_for_the_table_keeps_the_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "lists.parquet"
    to_parquet = ListWriter._to_parquet

    def on_a_full_disk(self: ListWriter) -> None:
        with files_up_to(1000):
            to_parquet(self)

    with monkeypatch.context() as patched:
        patched.setattr(ListWriter, "_to_parquet", on_a_full_disk)
        with pytest.raises(ValueError, match=r"can't write \S*lists\.parquet: "):
            mine_hard_negatives(ROWS, CORPUS, output=output, **OPTIONS)
    names = ["lists.parquet.mining.json", "lists.parquet.partial.jsonl"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert mine_hard_negatives(ROWS, CORPUS, output=output, **OPTIONS).resumed_lists == 200
    assert len(load_lists(output)) == 200
