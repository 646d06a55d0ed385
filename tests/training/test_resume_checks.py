"""What a run goes on from is what was written, of the same run, and nobody else writes beside
it.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from rerank_fast import CrossEncoder, Trainer
from rerank_fast.data.lists import ListStream
from rerank_fast.data.output_lock import locked
from rerank_fast.training.checksums import CHECKSUMS_FILE, write_checksums
from tests.training.conftest import config_for, make_lists, weights

SETTINGS = {
    "max_steps": 7,
    "save_steps": 2,
    "eval_steps": 3,
    "ema_decay": 0.9,
    "save_total_limit": 3,
}


@pytest.fixture(scope="module")
def stopped(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that ended early, with checkpoints 2 and 4."""
    directory = tmp_path_factory.mktemp("stopped") / "run"

    def stop(event) -> None:
        if event.name == "step_end" and event.step == 5:
            event.trainer.stop()

    config = config_for(directory, **SETTINGS)
    lists, held_out = make_lists(48), make_lists(9, seed=2)
    Trainer(tiny_bert, lists, eval=held_out, config=config, callbacks=[stop]).train()
    return directory


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def again(model: Path, run: Path, lists=None, held_out=None, **settings: object) -> Trainer:
    config = config_for(run, **{**SETTINGS, "resume": "auto", **settings})
    lists = make_lists(48) if lists is None else lists
    return Trainer(model, lists, eval=held_out or make_lists(9, seed=2), config=config)


def other(lists: Dataset, change: Callable[[list], object]) -> Dataset:
    rows = lists.to_list()
    change(rows)
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 2e-3}, "learning_rate was 0.001, got 0.002"),
        (
            {"warmup_ratio": 0.5, "sigma": 2.0},
            "warmup_ratio was 0.1, got 0.5; sigma was 1.0, got 2.0",
        ),
        ({"max_steps": 9}, "max_steps was 7, got 9"),
        ({"max_length": 9}, "max_length was 64, got 9"),
        (
            {"lists": other(make_lists(48), lambda rows: rows[40]["docs"].reverse())},
            "train_lists was 48 lists",
        ),
        (
            {"lists": other(make_lists(48), lambda rows: rows.reverse())},
            "train_lists was 48 lists .*, got 48 lists",
        ),
        (
            {"lists": other(make_lists(48), lambda rows: rows[47]["labels"].__setitem__(0, 3.0))},
            "train_lists was",
        ),
        (
            {"lists": other(make_lists(48), lambda rows: rows[0].update(query="who"))},
            "train_lists was 48 lists",
        ),
        ({"lists": make_lists(7)}, "train_lists was 48 lists .*, got 7 lists"),
        ({"held_out": make_lists(9, seed=3)}, r"eval was \['9 lists .*, got \['9 lists"),
    ],
)
def test_another_run_is_refused_with_both_values(
    tiny_bert: Path, run: Path, settings: dict, message: str
):
    before = sorted(run.rglob("*"))
    with pytest.raises(
        ValueError, match=f"checkpoint-4 is of a run with .*: {message}.*--resume_changed"
    ):
        again(tiny_bert, run, **settings).train()
    assert sorted(run.rglob("*")) == before
    again(tiny_bert, run, **settings, resume_changed=True)


def test_what_was_changed_stands_in_the_card_also_after_the_next_resume(tiny_bert: Path, run: Path):
    trainer = again(tiny_bert, run, learning_rate=2e-3, resume_changed=True)
    trainer.callbacks = [lambda event: trainer.stop() if event.name == "save" else None]
    trainer.train()
    again(tiny_bert, run, learning_rate=2e-3).train()
    card = (run / "README.md").read_text()
    assert "- `learning_rate`: 0.001 up to step 4, then 0.002\n" in card
    assert "- `learning_rate`: 0.002\n" in card


def test_what_may_change_is_not_asked_for(
    tiny_bert: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    free = {
        "logging_steps": 5,
        "save_steps": 3,
        "save_total_limit": 1,
        "trackers": [],
        "overwrite": True,
    }
    trainer = again(
        tiny_bert, run, **free, gradient_accumulation_steps=2, resume=str(run / "checkpoint-4")
    )
    trainer.train()
    assert "gradient_accumulation_steps 2, the interrupted run had 1" in caplog.text
    assert "Changed where" not in (run / "README.md").read_text()


def test_weights_that_are_not_trained_are_of_the_same_model(tiny_bert: Path, tmp_path: Path):
    model = CrossEncoder(tiny_bert, device="cpu")
    config = config_for(tmp_path / "run", max_steps=4, save_steps=2, freeze_layers=1)
    Trainer(tiny_bert, make_lists(48), config=config).train()
    with torch.no_grad():
        model.model.bert.embeddings.LayerNorm.weight[3] += 1
    with pytest.raises(ValueError, match="trained on another base model"):
        Trainer(model, make_lists(48), config=replace(config, resume="auto")).train()
    Trainer(tiny_bert, make_lists(48), config=replace(config, resume="auto")).train()


def test_of_a_stream_the_lists_read_before_the_run_are_compared(tiny_bert: Path, tmp_path: Path):
    settings = {"shuffle_buffer": 4, "save_steps": 2, "max_steps": 4}
    Trainer(tiny_bert, ListStream(make_lists(48)), config=config_for(tmp_path, **settings)).train()
    lists = other(make_lists(48), lambda rows: rows[9]["docs"].reverse())
    config = config_for(tmp_path, **settings, resume="auto")
    with pytest.raises(
        ValueError, match=r"train_lists was a stream that begins with 48 lists .*, got a stream"
    ):
        Trainer(tiny_bert, ListStream(lists), config=config).train()
    Trainer(tiny_bert, ListStream(make_lists(48)), config=config).train()


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trainer_state.safetensors", lambda file: flip(file, -100)),  # a weight
        ("trainer_state.safetensors", lambda file: flip(file, 40)),  # of the header
        ("trainer_state.safetensors", lambda file: file.write_bytes(file.read_bytes()[:100])),
        ("trainer_state.safetensors", Path.unlink),
        ("trainer_state.json", lambda file: file.write_text("[]")),
        ("model.safetensors", lambda file: flip(file, -1)),
        ("tokenizer.json", Path.unlink),
        (CHECKSUMS_FILE, lambda file: file.write_text("[]")),
        (CHECKSUMS_FILE, Path.unlink),
    ],
)
def test_a_damaged_file_is_named_and_auto_takes_the_checkpoint_before(
    tiny_bert: Path, run: Path, capfd: pytest.CaptureFixture, name: str, damage: Callable
):
    damage(run / "checkpoint-4" / name)
    with pytest.raises(ValueError, match=f"checkpoint-4/{name}"):
        again(tiny_bert, run, resume=str(run / "checkpoint-4"))
    assert again(tiny_bert, run).resumed_from == run / "checkpoint-2"
    said = capfd.readouterr().err
    assert f"checkpoint-4/{name}" in said
    assert f"going on from {run / 'checkpoint-2'}, which is whole." in said
    flip(run / "checkpoint-2" / "trainer_state.safetensors", -1)
    with pytest.raises(
        ValueError, match=f"no checkpoint in .* is whole: .*/{name}.*checkpoint-2/trainer_state"
    ):
        again(tiny_bert, run)


def test_going_on_from_the_checkpoint_before_a_damaged_one_gives_the_same_run(
    tiny_bert: Path, stopped: Path, run: Path, tmp_path: Path
):
    whole = shutil.copytree(stopped, tmp_path / "whole")
    flip(run / "checkpoint-4" / "trainer_state.safetensors", -100)
    for directory in (run, whole):
        again(tiny_bert, directory).train()
    a, b = weights(run), weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in a)


WEIGHT = "bert.encoder.layer.0.attention.self.query.weight"


def without(*kinds: str) -> Callable[[dict], dict]:
    return lambda tensors: {
        name: one for name, one in tensors.items() if not name.startswith(kinds)
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("optimizer."), r"tensors are missing, as optimizer\."),
        (
            without(f"optimizer.{WEIGHT}.exp_avg_sq"),
            rf"1 tensors are missing, as optimizer\.{WEIGHT}\.exp_avg_sq",
        ),
        (without("average."), r"tensors are missing, as average\."),
        (without(f"weights.{WEIGHT}"), rf"1 tensors are missing, as weights\.{WEIGHT}"),
        (
            lambda tensors: tensors | {"weights.nope": torch.zeros(1)},
            r"tensor weights\.nope: unknown",
        ),
        (
            lambda tensors: tensors | {f"weights.{WEIGHT}": torch.zeros(1, 32)},
            r"expected torch.float32 of shape \(32, 32\), got torch.float32 of \(1, 32\)",
        ),
        (
            lambda tensors: tensors | {f"weights.{WEIGHT}": tensors[f"weights.{WEIGHT}"].half()},
            "expected torch.float32 .*, got torch.float16",
        ),
        (
            lambda tensors: tensors | {f"optimizer.{WEIGHT}.exp_avg": torch.zeros(3)},
            r"tensor optimizer\..*\.exp_avg: expected .*, got torch.float32 of \(3,\)",
        ),
        (
            lambda tensors: tensors | {f"optimizer.{WEIGHT}.step": torch.zeros(2)},
            r"step: expected .*, got .*\(2,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_copied(
    tiny_bert: Path, run: Path, change: Callable, message: str
):
    file = run / "checkpoint-4" / "trainer_state.safetensors"
    save_file(change(load_file(file)), file)
    write_checksums(file.parent)
    trainer = again(tiny_bert, run)
    before = {name: one.clone() for name, one in trainer.weights.items()}
    with pytest.raises(ValueError, match=f"checkpoint-4, trainer_state.safetensors.*{message}"):
        trainer.train()
    assert all(torch.equal(one, before[name]) for name, one in trainer.weights.items())
    assert not trainer.optimizer.state


def put(value: object, *path: str | int) -> Callable[[dict], object]:
    def change(content: dict) -> dict:
        place = content
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        return content

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [], "expected dict, got list"),
        (lambda content: {}, "field step, progress, .* is missing"),
        (
            lambda content: content | {"foreign": 1},
            "unknown field foreign; expected step, progress",
        ),
        (lambda content: content | {"progress": []}, "field progress: expected dict, got list"),
        (
            put("3", "progress", "step"),
            "field progress, field step: expected finite int, got str '3'",
        ),
        (put(True, "progress", "step"), "field step: expected finite int, got bool"),
        (put(-1, "progress", "step"), "progress, field step: expected from 1 to 7, got -1"),
        (put(99, "progress", "step"), "progress, field step: expected from 1 to 7, got 99"),
        (put(-1, "progress", "batch"), "progress, field batch: expected from 0 to 4, got -1"),
        (put(99, "progress", "epoch"), "progress, field epoch: expected from 0 to 4, got 99"),
        (
            put(float("nan"), "progress", "loss_sum"),
            "field loss_sum: expected finite float, got float nan",
        ),
        (
            put({"ndcg@10": None}, "progress", "best"),
            "field best, ndcg@10: expected finite float, got NoneType",
        ),
        (
            put({"kwh": 1}, "progress", "energy"),
            "field energy: field kg_co2, country, cpu_model, ram_gib, on_cloud is missing",
        ),
        (put(3, "step"), "field step: expected from 4 to 4, got 3"),
        (put(6, "progress", "batch"), "progress, field batch: expected from 0 to 4, got 6"),
        (put({}, "scheduler"), "field scheduler: field last_epoch, _step_count is missing"),
        (
            put(-1, "scheduler", "last_epoch"),
            "scheduler, field last_epoch: expected from 0 to 4, got -1",
        ),
        (
            put({"scale": 2.0}, "scaler"),
            "field scaler: expected {}, or other numbers, got {'scale'",
        ),
        (put([], "random"), "field random: expected the state of each process, got none"),
        (put([{}], "random"), r"field random\[0\]: expected states of generators"),
        (put([1], "random", 0, "torch"), r"field random\[0\]: expected states of generators"),
        (
            put([1] * 623, "random", 0, "numpy", 1),
            r"field random\[0\]: expected states of generators",
        ),
        (put("many", "memory"), "field memory: expected finite int, got str"),
        (
            put(0, "max_tokens_per_microbatch"),
            "max_tokens_per_microbatch: expected from 1 to inf, got 0",
        ),
        (put([], "run"), "field run: expected dict, got list"),
    ],
)
def test_values_that_do_not_fit_are_named(
    tiny_bert: Path, run: Path, change: Callable, message: str
):
    file = run / "checkpoint-4" / "trainer_state.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    write_checksums(file.parent)
    trainer = again(tiny_bert, run)
    with pytest.raises(ValueError, match=f"checkpoint-4, trainer_state.json.*{message}"):
        trainer.train()
    assert not trainer.optimizer.state
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_a_log_that_was_shortened_gets_no_gap(tiny_bert: Path, run: Path):
    (run / "train_log.jsonl").write_text('{"step": 1, "epoch": 0.1}\n')
    again(tiny_bert, run).train()
    assert "\0" not in (run / "train_log.jsonl").read_text()


def test_one_run_at_a_time_writes_to_an_output(tiny_bert: Path, tmp_path: Path):
    config = config_for(tmp_path / "run", max_steps=3, overwrite=True)
    made_before = Trainer(tiny_bert, make_lists(8), config=config)
    refused = []

    def second(event) -> None:
        if event.name == "step_end" and event.step == 1:
            for start in (
                made_before.train,
                lambda: Trainer(tiny_bert, make_lists(8), config=config),
            ):
                with pytest.raises(
                    ValueError, match=rf"is being written by process {os.getpid()} on .* since 2"
                ):
                    start()
                refused.append(event.step)

    Trainer(tiny_bert, make_lists(48), config=config, callbacks=[second]).train()
    assert refused == [1, 1]
    assert not list((tmp_path / "run").glob(".*"))
    # One that has come and gone is not overwritten by a run that was made before it.
    late = Trainer(
        tiny_bert,
        make_lists(8),
        config=replace(config, output=str(tmp_path / "late"), overwrite=False),
    )
    shutil.copytree(tmp_path / "run", tmp_path / "late")
    with pytest.raises(ValueError, match="late already holds a model"):
        late.train()


def test_what_a_killed_process_leaves_locks_nothing(tmp_path: Path):
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".lock.json").write_text(
        '{"process": 1, "host": "here", "since": "2020-01-01 00:00:00"}'
    )
    with locked(tmp_path):
        (tmp_path / ".lock.json").unlink()
        with (
            pytest.raises(ValueError, match="is being written by another process"),
            locked(tmp_path),
        ):
            pass
    assert not list(tmp_path.iterdir())


def test_nothing_is_made_for_a_run_that_can_not_begin(tiny_bert: Path, tmp_path: Path):
    config = config_for(tmp_path / "a" / "run")
    with pytest.raises(ValueError, match="nope"):
        Trainer(tmp_path / "nope", make_lists(4), config=config)
    with pytest.raises(ValueError, match=r"nope\.jsonl does not exist"):
        Trainer(tiny_bert, str(tmp_path / "nope.jsonl"), config=config)
    assert not (tmp_path / "a").exists()


def test_checkpoints_alone_are_not_called_a_model(tiny_bert: Path, run: Path):
    for path in run.iterdir():
        if path.is_file():
            path.unlink()
    with pytest.raises(
        ValueError, match=r"already holds the checkpoints of a run; pass .* to replace them, or"
    ):
        again(tiny_bert, run, resume="never")


@pytest.mark.skipif(os.name != "posix", reason="there is no umask")
def test_files_and_directories_follow_the_umask(tiny_bert: Path, tmp_path: Path):
    before = os.umask(0o027)
    try:
        config = config_for(tmp_path / "run", max_steps=3, save_steps=2)
        Trainer(tiny_bert, make_lists(48), config=config).train()
    finally:
        os.umask(before)
    for path in (tmp_path / "run", *(tmp_path / "run").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
