"""`train --dry_run` counts what training would read, says what it would do, and leaves no trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rerank_fast import Trainer, TrainingConfig, cli
from rerank_fast.training.dry_run import count
from tests.training.conftest import make_lists
from tests.training.distributed.test_distributed import TORCHRUN, environment

_LONG = "rain " * 60
_ROWS = [
    {"query": "what is the panda", "docs": ["panda rain", "bear sea", _LONG], "labels": [1, 0, 0]},
    {"query": "what is the bear", "docs": ["bear", "fish"], "labels": [2, 1]},
    {"query": "what is the fish", "docs": [_LONG, "fish"], "labels": [1, 1]},  # no preference pair
    {"query": "what is the sea", "docs": ["sea", "rain", "sun", "city"], "labels": [3, 2, 1, 0]},
]


def write(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def snapshot(directory: Path) -> dict[str, bytes | None]:
    paths = sorted(directory.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def flags(tiny_bert: Path, tmp_path: Path, *more: str, rows: list = _ROWS) -> list[str]:
    lists = write(tmp_path / "lists.jsonl", rows)
    output = str(tmp_path / "out")
    return ["train", "--model", str(tiny_bert), "--train", str(lists), "--output", output,
            "--precision", "fp32", "--show_progress_bar", "false", "--max_length", "32",
            "--batch_size", "3", "--dry_run", *more]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_everything_is_counted_and_nothing_written(
    streaming: bool,
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    evaluated = [
        {**_ROWS[0], "query": "What  is the PANDA"},
        {**_ROWS[1], "query": "what is the rain"},
    ]
    held_out = write(tmp_path / "eval.jsonl", evaluated)
    more = ["--streaming", "true", "--max_steps", "5"] if streaming else ["--num_epochs", "3"]
    arguments = flags(tiny_bert, tmp_path, "--eval", str(held_out), "--push", "me/it", *more)
    before = snapshot(tmp_path)
    assert cli.main(arguments) == 0
    assert snapshot(tmp_path) == before
    lines = capsys.readouterr().out.splitlines()
    # 2 + 1 + 6 preference pairs of 3 + 2 + 4 documents; a list of 2 has none.
    assert lines[0] == (
        "Training lists: 4 with 11 documents; 1 of the lists, without a preference pair (all "
        "labels equal), train nothing"
    )
    assert lines[1] == (
        "Epoch: 9 preference pairs, 9 pairs to score, 1 of them longer than 32 tokens and truncated"
    )
    counts = "2 lists with 5 documents, 1 of them truncated"
    assert lines[2] == f"Evaluation: {counts}; 1 of the queries are trained on too"
    steps = "5 of 3 lists, of a stream" if streaming else "6 of 3 lists, 3 epochs of 2 steps"
    assert lines[3] == f"Steps: {steps}"
    assert lines[4] == "Precision: fp32 on cpu"
    assert lines[5].startswith(
        f"Would write to {tmp_path / 'out'} (to be made; the run begins anew): the best model"
    )
    assert lines[6:] == ["Would push to me/it", "Nothing was trained or written."]


@pytest.mark.parametrize("sampled", [None, 3])
def test_it_counts_what_the_first_epoch_then_takes(
    sampled: int | None,
    tiny_bert: Path,
    tmp_path: Path,
) -> None:
    lists = make_lists(30)
    config = TrainingConfig(
        output=str(tmp_path / "out"), batch_size=7, precision="fp32", max_docs_per_list=sampled,
        show_progress_bar=False, max_length=12,
    )  # fmt: skip
    trainer = Trainer(tiny_bert, lists, config=config)
    counted = count(trainer)
    taken = [batch for batch, _ in zip(trainer.batches(), range(trainer.num_batches), strict=False)]
    assert counted.units == [sum(batch.units for batch in taken)]
    assert counted.pairs == sum(len(batch.lists.pairs) for batch in taken)
    assert counted.documents == sum(map(len, lists["docs"]))
    assert (counted.pairs == counted.documents) == (sampled is None)
    assert counted.truncated == sum(batch.lists.truncated for batch in taken)
    assert 0 < counted.truncated < counted.pairs
    trainer.train()  # and it stands in nothing's way


def test_a_run_that_would_go_on_says_so(
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    arguments = flags(tiny_bert, tmp_path, "--max_steps", "2", "--save_steps", "1")
    assert cli.main([one for one in arguments if one != "--dry_run"]) == 0
    before = snapshot(tmp_path)
    assert cli.main([*arguments, "--resume"]) == 0
    assert snapshot(tmp_path) == before
    assert f"the run goes on from {tmp_path / 'out' / 'checkpoint-1'})" in capsys.readouterr().out
    assert cli.main(arguments) == 2  # what the run itself would refuse
    assert "already holds a model" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [False, True])
def test_a_malformed_row_is_named(
    streaming: bool,
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    rows = [*_ROWS, {"query": "q", "docs": ["d", "e"], "labels": [1]}]
    more = ["--streaming", "true", "--max_steps", "1"] if streaming else []
    arguments = flags(tiny_bert, tmp_path, *more, rows=rows)
    before = snapshot(tmp_path)
    assert cli.main(arguments) == 2
    place = f"{tmp_path / 'lists.jsonl'}, line 5"
    assert f"{place}: 2 documents in docs but 1 labels" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_two_processes_count_what_one_counts(tiny_bert: Path, tmp_path: Path):
    rows = [_ROWS[0]] * 4  # each process has truncated pairs
    arguments = flags(tiny_bert, tmp_path, "--eval", str(tmp_path / "lists.jsonl"), rows=rows)
    before = snapshot(tmp_path)
    found = []
    for start in ([sys.executable], [*TORCHRUN, "29681"]):
        command = [*start, "-m", "rerank_fast", *arguments]
        options = {"capture_output": True, "text": True, "timeout": 180}
        done = subprocess.run(command, env=environment(), check=False, **options)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1]  # by one of them
    assert ", 4 of them longer than 32 tokens and truncated" in found[0]
    assert snapshot(tmp_path) == before
