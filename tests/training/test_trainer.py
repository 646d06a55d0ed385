from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from rerank_fast import CrossEncoder, Trainer, lambda_loss
from rerank_fast.data.tokenized import tokenize_lists
from rerank_fast.evaluation import RerankingEvaluator
from tests.training.conftest import config_for, log_rows, make_lists, weights


def test_tokenized_lists_hold_the_pairs_of_each_list(tiny_bert: Path):
    model = CrossEncoder(tiny_bert, device="cpu")
    lists = make_lists(600)  # more than one tokenizer call
    tokens = tokenize_lists(list(lists), model)
    assert len(tokens) == 600
    chosen = tokens.select(np.array([599, 3]))
    last, third = lists[599], lists[3]
    pairs = [(row["query"], doc) for row in (last, third) for doc in row["docs"]]
    assert chosen.list_offsets.tolist() == [0, len(last["docs"]), len(pairs)]
    assert chosen.labels.tolist() == last["labels"] + third["labels"]
    assert np.array_equal(chosen.pairs.input_ids, model.tokenize(pairs).input_ids)


def test_the_step_is_the_loss_of_whole_lists_in_their_own_order(tiny_bert: Path, tmp_path: Path):
    lists = make_lists(8)
    model = CrossEncoder(tiny_bert, device="cpu")
    pairs = [(row["query"], doc) for row in lists for doc in row["docs"]]
    labels = torch.tensor([label for row in lists for label in row["labels"]])
    offsets = torch.tensor([0, *np.cumsum([len(row["docs"]) for row in lists])])
    config = config_for(tmp_path, mini_batch_size=5, max_grad_norm=0.0)
    trainer = Trainer(model, lists, config=config)
    expected = lambda_loss(model(model.preprocess(pairs))["scores"].reshape(-1), labels, offsets)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.weights.items() if p.grad is not None}
    model.zero_grad()
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    batch = next(trainer.batches())
    assert sorted(batch.indices.tolist()) == list(range(8))
    loss, gradient_norm, *_ = trainer.step(batch)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_norm, norm, rtol=1e-4, atol=1e-6)


def test_it_learns_and_leaves_the_best_model_with_its_figures(
    tiny_bert: Path, train_lists: Dataset, eval_lists: Dataset, tmp_path: Path
):
    config = config_for(tmp_path, num_epochs=10, eval_steps=12, save_steps=12, learning_rate=5e-3)
    result = Trainer(str(tiny_bert), train_lists, eval=eval_lists, config=config).train()
    assert result.steps == 60
    rows = log_rows(tmp_path)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 60
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert result.train_loss == pytest.approx(np.mean(losses))
    assert {"step", "epoch", "loss", "learning_rate", "gradient_norm", "pairs_per_second"} <= rows[
        0
    ].keys()
    assert {"wait_share", "padding_share", "skipped_share"} <= rows[0].keys()
    evaluations = [row for row in rows if "ndcg@10" in row]
    assert [row["step"] for row in evaluations] == [12, 24, 36, 48, 60]
    best = max(evaluations, key=lambda row: row["ndcg@10"])
    assert (result.best_step, result.metrics["ndcg@10"]) == (best["step"], best["ndcg@10"])
    before = RerankingEvaluator(eval_lists)(CrossEncoder(tiny_bert, device="cpu"))
    assert best["ndcg@10"] > max(before["ndcg@10"], best["base_ndcg@10"])

    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-36",
        "checkpoint-48",
    ]
    assert json.loads((tmp_path / "checkpoint-48" / "trainer_state.json").read_text())["step"] == 48
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["metrics"] == result.metrics
    assert (written["steps"], written["best_step"]) == (60, result.best_step)
    assert written["seconds"] > 0
    again = RerankingEvaluator(eval_lists)(CrossEncoder(tmp_path, device="cpu"))
    assert again["ndcg@10"] == pytest.approx(best["ndcg@10"], abs=1e-9)
    assert not list(tmp_path.glob(".*"))


def test_sentence_transformers_opens_the_trained_model(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path
):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    Trainer(str(tiny_bert), train_lists, config=config_for(tmp_path, max_steps=2)).train()
    theirs = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    assert isinstance(theirs.activation_fn, torch.nn.Sigmoid)
    pairs = [("what is the panda", doc) for doc in train_lists[0]["docs"]]
    ours = CrossEncoder(tmp_path, device="cpu")
    assert isinstance(ours.activation_fn, torch.nn.Sigmoid)
    np.testing.assert_allclose(ours.predict(pairs), theirs.predict(pairs), atol=1e-5)


def test_equal_seeds_give_equal_weights_and_others_do_not(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path
):
    for name, seed in {"a": 3, "b": 3, "c": 4}.items():
        Trainer(
            str(tiny_bert), train_lists, config=config_for(tmp_path / name, max_steps=4, seed=seed)
        ).train()
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_a_fresh_head_is_drawn_from_the_seed(train_lists: Dataset, tmp_path: Path):
    from tests.model_factory import make_tiny_bert

    bare = make_tiny_bert(tmp_path / "bare", head=False)
    for name in "ab":
        torch.manual_seed(ord(name))
        Trainer(str(bare), train_lists, config=config_for(tmp_path / name, max_steps=1)).train()
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bf16_trains_fp32_weights(tiny_bert: Path, train_lists: Dataset, tmp_path: Path):
    model = CrossEncoder(tiny_bert, device="cpu", dtype="bfloat16")
    config = config_for(
        tmp_path, precision="bf16", num_epochs=4, learning_rate=5e-3, gradient_checkpointing=True
    )
    Trainer(model, train_lists, config=config).train()
    losses = [row["loss"] for row in log_rows(tmp_path)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert {
        tensor.dtype for tensor in weights(tmp_path).values() if tensor.is_floating_point()
    } == {torch.float32}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_rises_then_falls(
    schedule: str, tiny_bert: Path, train_lists: Dataset, tmp_path: Path
):
    config = config_for(tmp_path, schedule=schedule, max_steps=10, warmup_ratio=0.2)
    result = Trainer(str(tiny_bert), train_lists, config=config).train()
    assert result.steps == 10  # into the second epoch of 6 steps
    rates = [row["learning_rate"] for row in log_rows(tmp_path)]
    assert rates[0] == 0  # the first step's own
    peak = int(np.argmax(rates))
    assert peak == 2
    assert rates[peak] == pytest.approx(1e-3)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    after_one = {"linear": 7 / 8, "cosine": (1 + math.cos(math.pi / 8)) / 2}[schedule]
    assert rates[peak + 1] == pytest.approx(1e-3 * after_one)


def test_decay_leaves_biases_and_norms_alone(tiny_bert: Path, tmp_path: Path):
    tied = Dataset.from_list(
        [{"query": "panda", "docs": ["bear", "fish"], "labels": [1.0, 1.0]}] * 4
    )
    config = config_for(tmp_path, batch_size=2, weight_decay=0.5, warmup_ratio=0.0, max_steps=2)
    # No preference pairs, so decay alone.
    assert Trainer(str(tiny_bert), tied, config=config).train().train_loss == 0
    before, after = weights(tiny_bert), weights(tmp_path)
    for name in before:
        shrunk = not torch.equal(before[name], after[name])
        assert shrunk == (before[name].dim() >= 2), name


def test_a_loss_that_is_no_longer_finite_stops_the_run_and_names_its_lists(
    tiny_bert: Path, tmp_path: Path
):
    def spoil(event) -> None:
        if event.name == "step_end" and event.step == 4:
            with torch.no_grad():
                event.trainer.weights["classifier.weight"].fill_(float("nan"))

    lists = make_lists(48)
    config = config_for(tmp_path, logging_steps=99, save_steps=3)
    trainer = Trainer(tiny_bert, lists, config=config, callbacks=[spoil])
    fifth = list(islice(trainer.batches(), 5))[-1]
    with pytest.raises(
        FloatingPointError,
        match=r"loss became nan in step 5; .*/non_finite_loss.json has.* checkpoint-3 is",
    ):
        trainer.train()
    written = json.loads((tmp_path / "non_finite_loss.json").read_text())
    assert written == {
        "step": 5,
        "loss": "nan",
        "gradient_norm": "nan",
        "lists": fifth.indices.tolist(),
    }
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    scores = CrossEncoder(tmp_path / "checkpoint-3", device="cpu").predict([("panda", "bear")])
    assert np.isfinite(scores).all()
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_a_save(
    tiny_bert: Path, tmp_path: Path, value: str
):
    config = config_for(tmp_path, logging_steps=99, save_steps=2, eval_steps=4, save_total_limit=1)
    trainer = Trainer(tiny_bert, make_lists(48), eval=make_lists(4), config=config)
    fourth = list(islice(trainer.batches(), 4))[-1]
    backward, calls = trainer.backward, []

    def spoiled(*arguments):
        loss_and_pairs = backward(*arguments)
        calls.append(1)
        if len(calls) == 4:
            trainer.weights["classifier.weight"].grad.fill_(float(value))
        return loss_and_pairs

    trainer.backward = spoiled
    spoiled.max_tokens, spoiled.state_dict = backward.max_tokens, backward.state_dict
    with pytest.raises(
        FloatingPointError, match=rf"the gradient's norm became {value} in step 4; .*its lists"
    ):
        trainer.train()
    written = json.loads((tmp_path / "non_finite_loss.json").read_text())
    assert (written["step"], written["gradient_norm"]) == (4, value)
    assert np.isfinite(float(written["loss"]))
    assert written["lists"] == fourth.indices.tolist()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "checkpoint-2").values())
    assert not (tmp_path / "config.json").exists()


def test_lists_without_a_preference_pair_are_said_once_and_counted(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def run(name: str, lists: list[dict], **settings: object) -> None:
        caplog.clear()
        config = config_for(tmp_path / name, batch_size=4, max_steps=4, logging_steps=2, **settings)
        Trainer(tiny_bert, Dataset.from_list(lists), config=config).train()

    def said() -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if "preference pair" in record.getMessage()
        ]

    tied = {"query": "panda", "docs": ["bear", "fish"], "labels": [0.0, 0.0]}
    single = {"query": "panda", "docs": ["bear"], "labels": [1.0]}
    run("all", [tied, single] * 2)
    (line,) = said()
    assert "(all labels equal) train nothing, 4 of 4 in the first batch that has one" in line
    assert [row["lists_without_gradient"] for row in log_rows(tmp_path / "all")] == [8, 16]
    run("some", [tied, tied, tied, {**tied, "labels": [1.0, 0.0]}])
    assert "3 of 4" in said()[0]
    assert [row["lists_without_gradient"] for row in log_rows(tmp_path / "some")] == [6, 12]
    run("none", [{**tied, "labels": [1.0, 0.0]}] * 4)
    assert said() == []
    assert log_rows(tmp_path / "none")[-1]["lists_without_gradient"] == 0
    # NDCGLoss1 counts every ordered pair: equal labels are no reason, a document alone is.
    run("ndcg1", [tied, tied, tied, single], scheme="ndcg1")
    assert "1 of 4" in said()[0]


def test_an_output_that_holds_a_model_is_refused_before_the_data_is_read(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path
):
    config = config_for(tmp_path / "run", max_steps=1, save_steps=1)
    Trainer(str(tiny_bert), train_lists, config=config).train()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a model; pass overwrite=True"):
        Trainer("no/such/model", "no/such/lists.jsonl", config=config)
    with pytest.raises(
        ValueError
    ):  # bad data costs the earlier run nothing, even with leave to replace it
        Trainer(str(tiny_bert), "no/such/lists.jsonl", config=replace(config, overwrite=True))
    assert (tmp_path / "run" / "metrics.json").exists()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    # A run may start from the very directory it replaces; its checkpoints and log don't mix with
    # the old ones.
    config = replace(config, overwrite=True, max_steps=3, save_steps=2)
    for name in ("adapter/adapter_config.json", "onnx/model.onnx"):  # of the model that is replaced
        (tmp_path / "run" / name).parent.mkdir()
        (tmp_path / "run" / name).write_text("")
    Trainer(tmp_path / "run", train_lists, config=config).train()
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "onnx" / "model.onnx").exists()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(log_rows(tmp_path / "run")) == 3


def test_what_no_run_can_use_is_refused_before_training(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path
):
    with pytest.raises(ValueError, match="config must be a TrainingConfig, got a dict"):
        Trainer(str(tiny_bert), train_lists, config={"max_steps": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written"):
        Trainer(str(tiny_bert), train_lists, config=config_for(tmp_path / "file" / "run"))
    with pytest.raises(ValueError):
        Trainer(str(tmp_path / "missing"), train_lists, config=config_for(tmp_path / "run"))
    with pytest.raises(ValueError):
        Trainer(str(tiny_bert), tmp_path / "missing.jsonl", config=config_for(tmp_path / "run"))
    with pytest.raises(ValueError, match="has 64 positions"):
        Trainer(str(tiny_bert), train_lists, config=config_for(tmp_path / "run", max_length=65))
    with pytest.raises(
        ValueError, match=r"early_stopping_patience is 2, but nothing is evaluated: .*eval "
    ):
        Trainer(
            str(tiny_bert),
            train_lists,
            config=config_for(tmp_path / "run", early_stopping_patience=2),
        )
    with pytest.raises(ValueError, match="learning_rate"):
        Trainer(
            str(tiny_bert), train_lists, config=config_for(tmp_path / "run", learning_rate=-1.0)
        )
