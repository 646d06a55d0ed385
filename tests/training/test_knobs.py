"""What users turn: precision, layers, averages, adapters, early stopping, trackers, callbacks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from rerank_fast import CrossEncoder, Trainer
from rerank_fast.evaluation import RerankingEvaluator
from rerank_fast.training.freezing import layer_depths
from tests.model_factory import make_tiny_roberta
from tests.training.conftest import config_for, log_rows, make_lists, weights

PAIRS = [("what is the panda", doc) for doc in ("panda rain", "bear", "fish sea city")]


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in log_rows(directory) if "loss" in row]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-pure"])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_narrow_precision_follows_fp32(
    still_bert: Path, train_lists: Dataset, tmp_path: Path, precision: str, cache: str
):
    for name in ("fp32", precision):
        config = config_for(
            tmp_path / name, precision=name, gradient_cache=cache, num_epochs=3, learning_rate=2e-3
        )
        Trainer(still_bert, train_lists, config=config).train()
    wide, narrow = losses(tmp_path / "fp32"), losses(tmp_path / precision)
    assert np.mean(narrow[-3:]) < 0.8 * np.mean(narrow[:3])
    np.testing.assert_allclose(narrow[:6], wide[:6], rtol=0.1)
    dtype = torch.bfloat16 if precision == "bf16-pure" else torch.float32
    assert {t.dtype for t in weights(tmp_path / precision).values() if t.is_floating_point()} == {
        dtype
    }


def test_pure_bf16_keeps_what_bf16_weights_would_lose(
    still_bert: Path, train_lists: Dataset, tmp_path: Path
):
    config = config_for(
        tmp_path, precision="bf16-pure", max_steps=6, learning_rate=1e-5, warmup_ratio=0.0
    )
    trainer = Trainer(still_bert, train_lists, config=config)
    before = {name: weight.clone() for name, weight in trainer.weights.items()}
    trainer.train()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    moved = trainer.weights[name] - before[name]
    assert trainer.weights[name].dtype == torch.float32
    assert (moved != 0).float().mean() > 0.9
    in_model = dict(trainer.model.model.named_parameters())[name]
    assert torch.equal(in_model, trainer.weights[name].to(torch.bfloat16))
    assert (
        in_model != before[name].to(torch.bfloat16)
    ).float().mean() < 0.2  # most are too small to be seen yet


def test_an_overflow_leaves_the_step_out_and_is_counted(
    still_bert: Path, train_lists: Dataset, tmp_path: Path
):
    trainer = Trainer(
        still_bert, train_lists, config=config_for(tmp_path, precision="fp16", max_steps=6)
    )
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    trainer.backward.scale = trainer.scaler.scale
    before = {name: weight.clone() for name, weight in trainer.weights.items()}
    kept = []
    trainer.callbacks = [
        lambda event: (
            kept.append(all(torch.equal(before[n], w) for n, w in trainer.weights.items()))
            if event.name == "step_end"
            else None
        )
    ]
    trainer.train()
    rows = log_rows(tmp_path)
    assert kept[0]
    assert rows[0]["overflows"] == 1
    assert rows[-1]["loss_scale"] == 2.0 ** (40 - rows[-1]["overflows"])
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_frozen_layers_stay_and_the_rest_learns(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path
):
    before = weights(tiny_bert)
    config = config_for(
        tmp_path, freeze_layers=1, freeze=["bert.pooler.*"], max_steps=3, weight_decay=0.1
    )
    Trainer(tiny_bert, train_lists, config=config).train()
    after = weights(tmp_path)
    for name in before:
        frozen = name.startswith(("bert.embeddings.", "bert.encoder.layer.0.", "bert.pooler."))
        assert torch.equal(before[name], after[name]) == frozen, name
    for settings, message in (
        ({"freeze_layers": 3}, "freeze_layers is 3, but the model has 2 layers"),
        (
            {"freeze": ["bert.pooled.*"]},
            r"no parameter's name matches 'bert.pooled.\*'; there are bert.embeddings",
        ),
        ({"freeze": ["*"]}, "leaves no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(tiny_bert, train_lists, config=config_for(tmp_path / "x", **settings))


def test_each_layer_down_learns_slower(tiny_bert: Path, train_lists: Dataset, tmp_path: Path):
    config = config_for(
        tmp_path, layer_lr_decay=0.5, weight_decay=0.1, max_steps=2, warmup_ratio=0.0
    )
    trainer = Trainer(tiny_bert, train_lists, config=config)
    rates = {
        id(p): (g["lr"], g["weight_decay"])
        for g in trainer.optimizer.param_groups
        for p in g["params"]
    }
    expected = {
        "classifier.weight": (1e-3, 0.1),
        "bert.pooler.dense.bias": (1e-3, 0.0),
        "bert.encoder.layer.1.output.dense.weight": (5e-4, 0.1),
        "bert.encoder.layer.0.attention.self.key.bias": (2.5e-4, 0.0),
        "bert.embeddings.word_embeddings.weight": (1.25e-4, 0.1),
    }
    for name, rate_and_decay in expected.items():
        assert rates[id(trainer.weights[name])] == pytest.approx(rate_and_decay), name
    assert len(rates) == len(trainer.weights)
    assert set(layer_depths(trainer.model.model).values()) == {0, 1, 2, 3}
    trainer.train()
    assert [row["learning_rate"] for row in log_rows(tmp_path)] == pytest.approx([1e-3, 5e-4])


def test_the_moving_average_is_evaluated_and_saved(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path
):
    seen: list[dict[str, torch.Tensor]] = []

    def note(event) -> None:
        if event.name in ("train_begin", "step_end"):
            seen.append({name: weight.clone() for name, weight in event.trainer.weights.items()})

    config = config_for(tmp_path, ema_decay=0.7, max_steps=4, eval_steps=4)
    Trainer(
        tiny_bert, train_lists, eval=make_lists(9, seed=4), config=config, callbacks=[note]
    ).train()
    name = "classifier.weight"
    average = seen[0][name]
    for step in seen[1:]:
        average = 0.7 * average + 0.3 * step[name]
    saved = weights(tmp_path)
    torch.testing.assert_close(saved[name], average, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(saved[name], seen[-1][name], atol=1e-5)
    evaluated = [row for row in log_rows(tmp_path) if "map" in row][-1]
    again = RerankingEvaluator(make_lists(9, seed=4))(CrossEncoder(tmp_path, device="cpu"))
    assert again["ndcg@10"] == pytest.approx(evaluated["ndcg@10"], abs=1e-9)


def test_lora_is_trained_saved_reloaded_and_merged(tiny_bert: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    lists = make_lists(48)
    settings = {
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "learning_rate": 5e-3,
        "save_steps": 8,
        "max_steps": 12,
    }
    trainer = Trainer(tiny_bert, lists, config=config_for(tmp_path / "run", **settings))
    step = trainer.model.prepare(trainer.model.tokenize(PAIRS))
    assert not step.padded  # adapters run packed
    trainer.train()
    assert np.mean(losses(tmp_path / "run")[-3:]) < np.mean(losses(tmp_path / "run")[:3])
    before, merged = weights(tiny_bert), weights(tmp_path / "run")
    assert merged.keys() == before.keys()
    assert torch.equal(
        before["bert.embeddings.word_embeddings.weight"],
        merged["bert.embeddings.word_embeddings.weight"],
    )
    assert not torch.allclose(
        before["bert.encoder.layer.0.attention.self.query.weight"],
        merged["bert.encoder.layer.0.attention.self.query.weight"],
    )
    with_adapters = trainer.model.predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(
        CrossEncoder(tmp_path / "run", device="cpu").predict(
            PAIRS, activation_fn=torch.nn.Identity()
        ),
        with_adapters,
        atol=1e-5,
    )
    # PEFT puts the adapter on the base model.
    base = CrossEncoder(tiny_bert, device="cpu", activation_fn=torch.nn.Identity())
    adapted = peft.PeftModel.from_pretrained(base.model, tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        scores = adapted(**base.preprocess(PAIRS)).logits.reshape(-1).numpy()
    np.testing.assert_allclose(scores, with_adapters, atol=1e-5)
    # And a run goes on from its checkpoint to the same bits.
    settings = {**settings, "resume": str(tmp_path / "run" / "checkpoint-8")}
    Trainer(tiny_bert, lists, config=config_for(tmp_path / "again", **settings)).train()
    again = weights(tmp_path / "again")
    assert all(torch.equal(merged[name], again[name]) for name in merged)


def test_a_lora_head_with_the_names_of_the_encoders_layers_is_trained_whole(tmp_path: Path):
    peft = pytest.importorskip("peft")
    roberta = make_tiny_roberta(tmp_path / "roberta")
    settings = {"lora_rank": 4, "learning_rate": 5e-3, "max_steps": 6}
    trainer = Trainer(roberta, make_lists(24), config=config_for(tmp_path / "run", **settings))
    trainer.train()
    with_adapters = trainer.model.predict(PAIRS, activation_fn=torch.nn.Identity())
    base = CrossEncoder(roberta, device="cpu", activation_fn=torch.nn.Identity())
    adapted = peft.PeftModel.from_pretrained(base.model, tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        scores = adapted(**base.preprocess(PAIRS)).logits.reshape(-1).numpy()
    np.testing.assert_allclose(scores, with_adapters, atol=1e-5)


def test_early_stopping_ends_after_evaluations_without_a_better_one(
    tiny_bert: Path, tmp_path: Path
):
    values = iter([0.1, 0.5, 0.4, 0.5, 0.9])
    config = config_for(tmp_path, early_stopping_patience=2, eval_steps=2, num_epochs=9)
    evaluator = lambda model: {"ndcg@10": next(values)}  # noqa: E731
    result = Trainer(tiny_bert, make_lists(48), evaluator=evaluator, config=config).train()
    assert (result.steps, result.best_step, result.metrics) == (8, 4, {"ndcg@10": 0.5})


def test_callbacks_are_told_what_happens_and_may_stop_the_run(tiny_bert: Path, tmp_path: Path):
    told: list[tuple[str, int]] = []

    def note(event) -> None:
        told.append((event.name, event.step))
        if event.name == "log":
            assert event.values["loss"] > 0
        if event.name == "evaluate":
            assert "ndcg@10" in event.values
        if event.name == "save":
            assert (event.values["path"] / "config.json").exists()
        if event.name == "step_end" and event.step == 3:
            event.trainer.stop()

    config = config_for(tmp_path, save_steps=2, logging_steps=2, eval_steps=9)
    result = Trainer(
        tiny_bert, make_lists(48), eval=make_lists(9), config=config, callbacks=[note]
    ).train()
    assert result.steps == 3
    assert told == [
        ("train_begin", 0), ("step_end", 1), ("step_end", 2), ("log", 2), ("save", 2), ("step_end",
        3), ("log", 3),
        ("evaluate", 3), ("train_end", 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("log", [("step_end", 2), ("log", 2), ("evaluate", 2), ("train_end", 2)]),
        ("evaluate", [("step_end", 2), ("log", 2), ("evaluate", 2), ("train_end", 2)]),
        ("save", [("step_end", 2), ("log", 2), ("evaluate", 2), ("save", 2), ("train_end", 2)]),
    ],
)
def test_stop_ends_the_run_after_the_current_step_whatever_event_it_is_called_in(
    tiny_bert: Path, tmp_path: Path, name: str, expected: list[tuple[str, int]]
):
    told: list[tuple[str, int]] = []

    def stop(event) -> None:
        told.append((event.name, event.step))
        if event.name == name and event.step == 2:
            event.trainer.stop()

    config = config_for(tmp_path, save_steps=2, eval_steps=2, logging_steps=99, max_steps=9)
    result = Trainer(
        tiny_bert, make_lists(48), eval=make_lists(9), config=config, callbacks=[stop]
    ).train()
    assert (result.steps, result.best_step) == (2, 2)
    assert told == [("train_begin", 0), ("step_end", 1), *expected]


def test_stop_in_a_save_still_evaluates_the_last_model(tiny_bert: Path, tmp_path: Path):
    def stop(event) -> None:
        if event.name == "save":
            event.trainer.stop()

    config = config_for(tmp_path, save_steps=3, eval_steps=2, max_steps=9)
    Trainer(tiny_bert, make_lists(48), eval=make_lists(9), config=config, callbacks=[stop]).train()
    assert [row["step"] for row in log_rows(tmp_path) if "map" in row] == [2, 3]


def test_tensorboard_holds_what_the_log_holds(tiny_bert: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_for(tmp_path, trackers=["tensorboard"], max_steps=3, eval_steps=3)
    Trainer(tiny_bert, make_lists(48), eval=make_lists(9), config=config).train()
    (file,) = (tmp_path / "tensorboard").rglob("events.out.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    for name in ("loss", "learning_rate", "ndcg@10"):
        expected = [(row["step"], row[name]) for row in log_rows(tmp_path) if name in row]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx(
            [value for _, value in expected], rel=1e-6
        )


def test_tensorboard_of_a_run_that_went_on_has_every_step_once(tiny_bert: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def fail(event) -> None:
        if event.name == "step_end" and event.step == 7:
            raise KeyboardInterrupt

    settings = {"trackers": ["tensorboard"], "max_steps": 9, "save_steps": 4, "eval_steps": 2}
    arguments = {"eval": make_lists(9), "config": config_for(tmp_path, **settings)}
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny_bert, make_lists(48), **arguments, callbacks=[fail]).train()
    arguments["config"] = config_for(tmp_path, **settings, resume="auto")
    Trainer(tiny_bert, make_lists(48), **arguments).train()
    files = list((tmp_path / "tensorboard").rglob("events.out.*"))
    assert len(files) == 2
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    for name in ("loss", "ndcg@10"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(row["step"], row[name]) for row in log_rows(tmp_path) if name in row]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx(
            [value for _, value in expected], rel=1e-6
        )


def test_wandb_offline_holds_what_the_log_holds(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_for(tmp_path, trackers=["wandb"], max_steps=3, eval_steps=3)
    Trainer(tiny_bert, make_lists(16), eval=make_lists(9), config=config).train()
    (file,) = tmp_path.rglob("run-*.wandb")
    records = wandb_records(file.read_bytes())
    found: dict[int, dict] = {}
    for record in records:
        if record.HasField("history"):
            items = {
                "/".join(item.nested_key) or item.key: item.value_json
                for item in record.history.item
            }
            found.setdefault(int(items["_step"]), {}).update(
                {name: json.loads(items[name]) for name in items}
            )
    for row in log_rows(tmp_path):
        for name in row.keys() - {"step", "epoch"}:
            assert found[row["step"]][name] == pytest.approx(row[name], rel=1e-12), name
    settings = {
        item.key or "/".join(item.nested_key): item.value_json
        for r in records
        for item in r.config.update
    }
    settings |= {
        item.key: item.value_json for record in records for item in record.run.config.update
    }
    assert settings["max_steps"] == "3"


def wandb_records(content: bytes) -> list:
    """The records of a run's file: 7 bytes of header, then LevelDB's log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, header, place = 32768, 7, 7
    whole, records = b"", []
    while place + header <= len(content):
        if block - place % block < header:  # the rest of a block is padding
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # full, or the last part
            records.append(Record.FromString(whole))
            whole = b""
    return records


def test_a_tracker_that_is_not_there_is_said_before_training(tiny_bert: Path, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"unknown tracker 'tensorbord'; there are .*tensorboard, .*wandb"
    ):
        Trainer(tiny_bert, make_lists(4), config=config_for(tmp_path, trackers=["tensorbord"]))
    with pytest.raises(
        ValueError, match="tracker 'swanlab' needs its package: pip install swanlab"
    ):
        Trainer(tiny_bert, make_lists(4), config=config_for(tmp_path, trackers=["swanlab"]))


def test_max_docs_and_a_warm_start(tiny_bert: Path, tmp_path: Path):
    first = config_for(tmp_path / "first", max_docs_per_list=3, max_steps=3)
    trainer = Trainer(tiny_bert, make_lists(48), config=first)
    assert max(np.diff(next(trainer.batches()).lists.list_offsets)) == 3
    trainer.train()
    second = Trainer(
        tmp_path / "first", make_lists(48), config=config_for(tmp_path / "second", max_steps=1)
    )
    saved = weights(tmp_path / "first")
    assert all(torch.equal(saved[name], weight) for name, weight in second.weights.items())
    assert (
        json.loads((tmp_path / "first" / "metrics.json").read_text())["config"]["max_docs_per_list"]
        == 3
    )


def test_a_compiled_run_is_the_eager_one(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With dropout, and evaluations between the steps; inductor itself is tested in tests/model."""
    compile_layers = CrossEncoder.compile
    monkeypatch.setattr(
        CrossEncoder, "compile", lambda self: compile_layers(self, backend="aot_eager")
    )
    for name in ("eager", "compiled"):
        config = config_for(
            tmp_path / name, torch_compile=name == "compiled", max_steps=3, eval_steps=2
        )
        Trainer(tiny_bert, train_lists, eval=make_lists(4), config=config).train()
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-5)
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    for name, weight in eager.items():
        # What adds the same to all keys, or to all scores of a list, has rounding for a gradient:
        # Adam steps by it.
        atol = 3 * 1e-3 if name.endswith(("key.bias", "classifier.bias")) else 1e-5
        torch.testing.assert_close(compiled[name], weight, rtol=1e-4, atol=atol)


def test_compilation_without_a_compiler_is_refused_before_training(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"torch.compile needs a C\+\+ compiler"):
        Trainer(tiny_bert, train_lists, config=config_for(tmp_path, torch_compile=True))
