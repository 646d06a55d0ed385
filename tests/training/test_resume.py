"""Stop and go: killed anywhere and resumed, a run ends with the weights of one that was never
stopped.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from rerank_fast import CrossEncoder, Trainer
from rerank_fast.cards import lists as card_data
from rerank_fast.cards.energy import Energy, EnergyMeter
from rerank_fast.model import storage
from rerank_fast.training import checkpoints
from rerank_fast.training.checkpoints import CheckpointError
from rerank_fast.training.checksums import write_checksums
from rerank_fast.training.events import TrainingInterrupted
from tests.training.conftest import config_for, log_rows, make_lists, weights

SETTINGS = {
    "max_steps": 17,
    "save_steps": 4,
    "eval_steps": 5,
    "logging_steps": 3,
    "ema_decay": 0.9,
    "seed": 3,
}


@pytest.fixture(scope="module")
def unbroken(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dropout over three epochs that nothing stops."""
    directory = tmp_path_factory.mktemp("unbroken")
    config = config_for(directory / "run", **SETTINGS)
    Trainer(tiny_bert, make_lists(48), eval=make_lists(9, seed=2), config=config).train()
    return directory / "run"


def killed(
    tiny_bert: Path, directory: Path, *, at: int, inside_save: bool = False, **settings: object
) -> int:
    """The same run in a process that is killed at a step, or inside its save."""
    lists, held_out = directory / "lists.jsonl", directory / "eval.jsonl"
    for path, rows in ((lists, make_lists(48)), (held_out, make_lists(9, seed=2))):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = asdict(config_for(directory / "run", **{**SETTINGS, **settings}))
    sent = config | {
        "kill_at": at, "inside_save": inside_save, "model": str(tiny_bert),
        "lists": str(lists), "eval_lists": str(held_out),
    }  # fmt: skip
    (directory / "settings.json").write_text(json.dumps(sent))
    # Sums are cut by threads: bits agree with equal numbers of them.
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.killed_run", str(directory / "settings.json")],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    return done.returncode


def go_on(tiny_bert: Path, directory: Path, **settings: object) -> Trainer:
    config = config_for(directory / "run", **{**SETTINGS, "resume": "auto", **settings})
    trainer = Trainer(tiny_bert, make_lists(48), eval=make_lists(9, seed=2), config=config)
    trainer.train()
    return trainer


def assert_the_same_run(a: Path, b: Path) -> None:
    for place in (".", "checkpoint-16"):
        first, second = weights(a / place), weights(b / place)
        assert all(torch.equal(first[name], second[name]) for name in first), place
    ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (a, b))
    for name in ("steps", "best_step", "metrics"):
        assert ours[name] == theirs[name]
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-12)
    rows = [[row for row in log_rows(path) if "loss" in row or "map" in row] for path in (a, b)]
    # No line twice, none lost.
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]


@pytest.mark.parametrize(("at", "inside_save"), [(6, False), (12, True)])
def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(
    tiny_bert: Path, unbroken: Path, tmp_path: Path, at: int, inside_save: bool
):
    assert killed(tiny_bert, tmp_path, at=at, inside_save=inside_save) == -signal.SIGKILL
    whole = [path.name for path in checkpoints.checkpoints(tmp_path / "run")]
    assert whole == ["checkpoint-4", "checkpoint-8"][: 1 + (at > 8)]
    assert bool(list((tmp_path / "run").glob(".checkpoint-*"))) == inside_save
    assert go_on(tiny_bert, tmp_path).resumed_from == tmp_path / "run" / whole[-1]
    assert not list((tmp_path / "run").glob(".*"))
    assert_the_same_run(unbroken, tmp_path / "run")


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    tiny_bert: Path, unbroken: Path, tmp_path: Path, capfd: pytest.CaptureFixture
):
    """Its best model is there already; a job that starts itself again must not be refused."""
    assert killed(tiny_bert, tmp_path, at=6, save_steps=7, resume="auto") == -signal.SIGKILL
    assert storage.holds_model(tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(
        ValueError, match=r"already holds a model; .*resume='auto'.* begin its unfinished run anew"
    ):
        Trainer(tiny_bert, make_lists(48), config=config_for(tmp_path / "run", **SETTINGS))
    assert go_on(tiny_bert, tmp_path).resumed_from is None
    assert "has no checkpoint to go on from: it begins anew" in capfd.readouterr().err
    assert not (tmp_path / "run" / checkpoints.UNFINISHED_FILE).exists()
    assert_the_same_run(unbroken, tmp_path / "run")


def test_a_best_model_saved_just_before_the_first_checkpoint_does_not_block_the_next_start(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same steps for both, as the defaults have it."""

    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", stopped)
        with pytest.raises(KeyboardInterrupt):
            go_on(tiny_bert, tmp_path, save_steps=5, max_steps=6)
    assert storage.holds_model(tmp_path / "run")
    assert go_on(tiny_bert, tmp_path, save_steps=5, max_steps=6).resumed_from is None
    assert [path.name for path in tmp_path.glob("run/*checkpoint-*")] == ["checkpoint-5"]


def test_resume_auto_replaces_no_model_but_that_of_an_unfinished_run(
    tiny_bert: Path, tmp_path: Path
):
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    before = (model / "model.safetensors").read_bytes()
    finished = config_for(tmp_path / "finished", max_steps=1)
    Trainer(tiny_bert, make_lists(8), config=finished).train()
    for directory in (model, tmp_path / "finished"):
        with pytest.raises(
            ValueError, match=r"already holds a model; pass overwrite=True .* to replace it$"
        ):
            Trainer(
                tiny_bert, make_lists(8), config=config_for(directory, max_steps=1, resume="auto")
            )
    assert (model / "model.safetensors").read_bytes() == before


def scored(values: dict[int, float], now: list[int], metric: str = "ndcg@10"):
    """An evaluator with a figure for each step, and the callback that tells it the step."""

    def note(event) -> None:
        now[:] = [event.step]

    return {"evaluator": lambda model: {metric: values[now[0]]}, "callbacks": [note]}


def test_the_saved_model_is_the_one_that_the_figures_describe_after_going_back(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = config_for(tmp_path / "run", max_steps=8, save_steps=3, eval_steps=2)
    lists, now = make_lists(48), [0]
    Trainer(
        tiny_bert, lists, config=config, **scored({2: 0.5, 4: 0.5, 6: 0.9, 8: 0.6}, now)
    ).train()
    abandoned = weights(tmp_path / "run")
    back = replace(config, resume=str(tmp_path / "run" / "checkpoint-3"))
    at_6: list[dict[str, torch.Tensor]] = []

    def copy(event) -> None:
        if event.name == "step_end" and event.step == 6:
            at_6.append({name: weight.clone() for name, weight in event.trainer.weights.items()})

    told = scored({4: 0.4, 6: 0.45, 8: 0.4}, now)
    told["callbacks"].append(copy)
    other = replace(back, learning_rate=1e-5, resume_changed=True)
    result = Trainer(tiny_bert, lists, config=other, **told).train()
    assert "checkpoint-3 knows that of step 2, measured by ndcg@10, and" in caplog.text
    assert "holds that of step 6" in caplog.text
    assert (result.best_step, result.metrics) == (6, {"ndcg@10": 0.45})
    saved = weights(tmp_path / "run")
    assert not torch.equal(saved["classifier.weight"], abandoned["classifier.weight"])
    assert all(torch.equal(saved[name], weight) for name, weight in at_6[0].items())
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (written["best_step"], written["metrics"]) == (6, {"ndcg@10": 0.45})
    # A best that is there stays: checkpoint-6 knows that of step 6.
    caplog.clear()
    again = replace(other, resume=str(tmp_path / "run" / "checkpoint-6"), resume_changed=False)
    result = Trainer(tiny_bert, lists, config=again, **scored({8: 0.1}, now)).train()
    assert (result.best_step, result.metrics) == (6, {"ndcg@10": 0.45})
    assert "chosen anew" not in caplog.text
    # One measured otherwise can't be compared.
    again = replace(again, metric_for_best="map", resume_changed=True)
    result = Trainer(tiny_bert, lists, config=again, **scored({8: 0.1}, now, "map")).train()
    assert (result.best_step, result.metrics) == (8, {"map": 0.1})


def test_a_kill_inside_the_save_of_the_best_leaves_none_that_figures_describe(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_for(tmp_path / "run", max_steps=8, save_steps=3, eval_steps=2)
    lists, now = make_lists(48), [0]
    trainer = Trainer(tiny_bert, lists, config=config, **scored({2: 0.5, 4: 0.9}, now))
    save = trainer.trained.save

    def killed_at_4(directory: Path) -> None:
        save(directory)
        if directory == tmp_path / "run" and now == [4]:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.trained, "save", killed_at_4)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    # The steps after the checkpoint come out otherwise, as on a GPU they may.
    again = replace(config, resume="auto", learning_rate=1e-5, resume_changed=True)
    result = Trainer(
        tiny_bert, lists, config=again, **scored({4: 0.3, 6: 0.4, 8: 0.35}, now)
    ).train()
    assert (result.best_step, result.metrics) == (6, {"ndcg@10": 0.4})


def test_sigterm_checkpoints_exits_0_and_says_how_to_go_on(
    tiny_bert: Path, unbroken: Path, tmp_path: Path, capfd: pytest.CaptureFixture
):
    def terminate(event) -> None:
        if event.name == "step_end" and event.step == 5:  # where an evaluation is due too
            os.kill(os.getpid(), signal.SIGTERM)

    config = config_for(tmp_path / "run", **SETTINGS)
    handler = signal.getsignal(signal.SIGTERM)
    arguments = {"eval": make_lists(9, seed=2), "config": config, "callbacks": [terminate]}
    with pytest.raises(TrainingInterrupted) as stop:
        Trainer(tiny_bert, make_lists(48), **arguments).train()
    assert stop.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    assert stop.value.checkpoint == tmp_path / "run" / "checkpoint-5"
    said = capfd.readouterr().err
    assert "Stopped by a signal at step 5 of 17" in said
    assert "--resume auto" in said
    pairs = [("panda", "bear"), ("panda", "fish")]
    assert CrossEncoder(stop.value.checkpoint, device="cpu").predict(pairs).shape == (2,)
    go_on(tiny_bert, tmp_path)
    ours, theirs = weights(tmp_path / "run"), weights(unbroken)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    best = [
        json.loads((path / "metrics.json").read_text())["metrics"]
        for path in (tmp_path / "run", unbroken)
    ]
    assert best[0] == best[1]
    evaluations = [row["step"] for row in log_rows(tmp_path / "run") if "map" in row]
    assert evaluations == [5, 10, 15, 17]


def test_ctrl_c_checkpoints_and_a_second_one_ends_at_once(tiny_bert: Path, tmp_path: Path):
    def interrupt(event) -> None:
        if event.name == "step_end" and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    config = config_for(tmp_path / "once", max_steps=9)
    with pytest.raises(TrainingInterrupted):
        Trainer(tiny_bert, make_lists(48), config=config, callbacks=[interrupt]).train()
    assert (tmp_path / "once" / "checkpoint-2" / "model.safetensors").exists()
    config = config_for(tmp_path / "twice", max_steps=9)
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny_bert, make_lists(48), config=config, callbacks=[interrupt, interrupt]).train()
    assert not list((tmp_path / "twice").glob("checkpoint-*"))


def test_a_stream_goes_on_where_it_was(tiny_bert: Path, tmp_path: Path):
    settings = {
        "streaming": True,
        "shuffle_buffer": 16,
        "max_docs_per_list": 3,
        "save_steps": 4,
        "max_steps": 14,
    }
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_lists(48)))
    source = str(tmp_path / "lists.jsonl")
    Trainer(tiny_bert, source, config=config_for(tmp_path / "a", **settings)).train()
    Trainer(
        tiny_bert, source, config=config_for(tmp_path / "b", **settings), callbacks=[stop_at(10)]
    ).train()  # a run that ended early: 8 is its last checkpoint
    Trainer(tiny_bert, source, config=config_for(tmp_path / "b", **settings, resume="auto")).train()
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_malformed_row_of_a_stream_costs_no_step(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(card_data, "_FIRST", 8)  # lists that are read before the run
    settings = {
        "streaming": True,
        "shuffle_buffer": 4,
        "save_steps": 99,
        "max_steps": 9,
        "logging_steps": 99,
    }
    rows = [json.dumps(row) + "\n" for row in make_lists(48)]
    (tmp_path / "sound.jsonl").write_text("".join(rows))
    (tmp_path / "lists.jsonl").write_text(
        "".join([*rows[:30], rows[30].replace("query", "asked"), *rows[31:]])
    )
    config = config_for(tmp_path / "run", **settings)
    with pytest.raises(
        ValueError, match=r"lists.jsonl, line 31: .*checkpoint-\d holds the steps before: mend it"
    ):
        Trainer(tiny_bert, str(tmp_path / "lists.jsonl"), config=config).train()
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert int(saved.name.partition("-")[2]) == (30 - 4) // config.batch_size
    (tmp_path / "lists.jsonl").write_text("".join(rows))
    Trainer(tiny_bert, str(tmp_path / "lists.jsonl"), config=replace(config, resume="auto")).train()
    whole = Trainer(
        tiny_bert, str(tmp_path / "sound.jsonl"), config=config_for(tmp_path / "whole", **settings)
    )
    loss = whole.train().train_loss
    a, b = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())[
        "train_loss"
    ] == pytest.approx(loss)


def test_time_and_energy_are_those_of_all_parts(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    began = []

    def measured(meter: EnergyMeter) -> Energy:
        before = began[-1]
        return Energy(1.0 + (before.kwh if before else 0.0), 2.0, None, "A CPU", 23.5, False)

    monkeypatch.setattr(EnergyMeter, "start", lambda meter, before=None: began.append(before))
    monkeypatch.setattr(EnergyMeter, "so_far", measured)
    monkeypatch.setattr(EnergyMeter, "stop", measured)
    config = config_for(tmp_path / "run", max_steps=6, save_steps=2)
    Trainer(tiny_bert, make_lists(48), config=config, callbacks=[stop_at(3)]).train()
    file = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    values = json.loads(file.read_text())
    assert values["progress"]["seconds"] > 0
    values["progress"]["seconds"] += 3600
    file.write_text(json.dumps(values))
    write_checksums(file.parent)
    result = Trainer(tiny_bert, make_lists(48), config=replace(config, resume="auto")).train()
    assert result.seconds > 3600
    assert [before and before.kwh for before in began] == [None, 1.0]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- **Energy:** 2 kWh" in card
    assert "- **Training time:** 1.00 hours" in card


def test_energy_of_a_part_is_not_that_of_the_run(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_for(tmp_path / "run", max_steps=6, save_steps=2)
    with monkeypatch.context() as without:
        without.setattr(EnergyMeter, "so_far", lambda meter: None)
        Trainer(tiny_bert, make_lists(48), config=config, callbacks=[stop_at(3)]).train()
    Trainer(tiny_bert, make_lists(48), config=replace(config, resume="auto")).train()
    assert "**Energy and carbon:** not measured" in (tmp_path / "run" / "README.md").read_text()


def stop_at(step: int):
    def stop(event) -> None:
        if event.name == "step_end" and event.step == step:
            event.trainer.stop()

    return stop


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own with room for the run's beginning."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_is_said_and_the_checkpoint_before_is_whole(
    tiny_bert: Path, small_disk: Path, tmp_path: Path
):
    def fill(event) -> None:
        if event.name == "save" and event.step == 2:
            free = os.statvfs(small_disk)
            (small_disk / "filler").write_bytes(b"\0" * (free.f_bavail * free.f_frsize - 60_000))

    config = config_for(small_disk / "run", max_steps=8, save_steps=2)
    with pytest.raises(
        CheckpointError, match=r"can't write .*checkpoint-4: .*; checkpoint-2 is whole"
    ):
        Trainer(tiny_bert, make_lists(48), config=config, callbacks=[fill]).train()
    assert [path.name for path in (small_disk / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
    (small_disk / "filler").unlink()
    Trainer(
        tiny_bert, make_lists(48), config=replace(config, resume="auto", save_total_limit=1)
    ).train()
    config = config_for(tmp_path / "run", max_steps=8, save_steps=2)
    Trainer(tiny_bert, make_lists(48), config=config).train()
    a, b = weights(small_disk / "run"), weights(tmp_path / "run")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("free", [0, 4])
def test_a_full_disk_is_said_with_the_files_name(tiny_bert: Path, small_disk: Path, free: int):
    """Of each file that a run keeps beside its checkpoints."""
    (small_disk / "run").mkdir()
    room = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"\0" * (room.f_bavail * room.f_frsize - (free << 10)))
    config = config_for(small_disk / "run", max_steps=2, logging_steps=1)
    with pytest.raises(ValueError, match=r"can't write .*/run.*: No space left on device"):
        Trainer(tiny_bert, make_lists(48), config=config).train()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_leaves_nothing_behind(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    trainer = Trainer(
        tiny_bert, make_lists(48), config=config_for(tmp_path, max_steps=8, save_steps=2)
    )
    save_file, calls = checkpoints.save_file, []

    def failing(tensors, file) -> None:
        calls.append(file)
        if len(calls) == 2:
            Path(file).write_bytes(b"half")
            raise OSError(code, os.strerror(code))
        save_file(tensors, file)

    monkeypatch.setattr(checkpoints, "save_file", failing)
    with pytest.raises(CheckpointError, match=os.strerror(code)):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]
    checkpoints.load_checkpoint(tmp_path / "checkpoint-2")


def test_what_a_run_cannot_go_on_from_is_refused(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path
):
    config = config_for(tmp_path / "run", max_steps=5, save_steps=2)
    Trainer(tiny_bert, train_lists, config=config).train()
    with pytest.raises(ValueError, match=r"pass overwrite=True.*, or resume='auto'"):
        Trainer(tiny_bert, train_lists, config=config)
    with pytest.raises(ValueError, match=r"resume: .*nothing is no checkpoint"):
        Trainer(tiny_bert, train_lists, config=replace(config, resume=str(tmp_path / "nothing")))
    with pytest.raises(
        ValueError, match="batch_size must be the interrupted run's to go on from it: 8, got 4"
    ):
        Trainer(tiny_bert, train_lists, config=replace(config, resume="auto", batch_size=4)).train()
    for name, settings in (
        ("freeze_layers", {"freeze_layers": 1}),
        ("freeze", {"freeze": ["*.LayerNorm.*"]}),
        ("lora_alpha", {"lora_alpha": 3.0}),
    ):
        message = (
            rf"{name} must be the interrupted run's .*: .*; to train on with another, "
            "begin .*checkpoint-4 as"
        )
        with pytest.raises(ValueError, match=message):
            Trainer(
                tiny_bert, train_lists, config=replace(config, resume="auto", **settings)
            ).train()
    assert (
        tmp_path / "run" / "checkpoint-2"
    ).exists()  # nothing was removed for a run that did not start
    # Another checkpoint by its path, into another directory, and further than the first run went.
    other = replace(
        config, output=str(tmp_path / "other"), max_steps=7, resume_changed=True,
        resume=str(tmp_path / "run" / "checkpoint-2"),
    )  # fmt: skip
    assert Trainer(tiny_bert, train_lists, config=other).train().steps == 7
    assert [row["step"] for row in log_rows(tmp_path / "other")] == [3, 4, 5, 6, 7]
    assert (tmp_path / "other" / "model.safetensors").exists()


def test_an_average_that_is_new_on_resume_begins_with_the_checkpoints_weights(
    tiny_bert: Path, tmp_path: Path
):
    seen: list[torch.Tensor] = []

    def note(event) -> None:
        if event.name in ("train_begin", "step_end"):
            seen.append(event.trainer.weights["classifier.weight"].clone())

    config = config_for(tmp_path / "run", max_steps=4, save_steps=2)
    Trainer(tiny_bert, make_lists(48), config=config).train()
    config = replace(config, resume="auto", ema_decay=0.7, resume_changed=True)
    Trainer(tiny_bert, make_lists(48), config=config, callbacks=[note]).train()
    average = seen[0]
    for weight in seen[1:]:
        average = 0.7 * average + 0.3 * weight
    assert len(seen) == 3
    torch.testing.assert_close(
        weights(tmp_path / "run")["classifier.weight"], average, rtol=1e-6, atol=1e-7
    )
