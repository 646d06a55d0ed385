"""What a run measures: the loss of the evaluation lists, the model before training, the model that
is left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from rerank_fast import CrossEncoder, Trainer, lambda_loss
from rerank_fast.evaluation import RerankingEvaluator
from tests.training.conftest import config_for, log_rows, weights


def loss_of(model: CrossEncoder, lists: Dataset, **options: Any) -> float:
    """Of raw scores that predict gives, all lists in one."""
    pairs = [(row["query"], doc) for row in lists for doc in row["docs"]]
    scores = model.predict(pairs, activation_fn=nn.Identity(), convert_to_tensor=True)
    labels = torch.tensor([label for row in lists for label in row["labels"]])
    offsets = torch.tensor([0, *map(len, lists["docs"])]).cumsum(0)
    return float(lambda_loss(scores, labels, offsets, **options))


@pytest.mark.parametrize(
    ("settings", "options", "factor"),
    [
        ({}, {}, 1),
        ({"scheme": "lambdarank", "k": 2, "sigma": 2.0}, {"scheme": "lambdarank", "k": 2,
        "sigma": 2.0}, 1),
        ({"reduction": "lists", "eps": 0.5}, {"reduction": "sum", "eps": 0.5}, 1 / 24),
        ({"reduction": "sum"}, {"reduction": "sum"}, 8 / 24),  # of a batch of 8
    ],
)  # fmt: skip
def test_the_loss_of_the_evaluation_lists_is_the_runs_own(
    settings: dict[str, Any], options: dict[str, Any], factor: float,
    tiny_bert: Path, train_lists: Dataset, eval_lists: Dataset, tmp_path: Path,
):  # fmt: skip
    config = config_for(tmp_path, max_steps=4, eval_steps=2, eval_on_start=True, **settings)
    result = Trainer(tiny_bert, train_lists, eval=eval_lists, config=config).train()
    rows = {row["step"]: row for row in log_rows(tmp_path) if "eval_loss" in row}
    assert list(rows) == [0, 2, 4]
    before = loss_of(CrossEncoder(tiny_bert, device="cpu"), eval_lists, **options) * factor
    assert rows[0]["eval_loss"] == pytest.approx(before, rel=1e-4)
    saved = loss_of(CrossEncoder(tmp_path, device="cpu"), eval_lists, **options) * factor
    assert rows[result.best_step]["eval_loss"] == pytest.approx(saved, rel=1e-4)
    assert result.metrics["eval_loss"] == rows[result.best_step]["eval_loss"]


def test_the_model_before_training_is_measured_and_never_the_best(
    tiny_bert: Path, train_lists: Dataset, eval_lists: Dataset, tmp_path: Path
):
    seen = []
    config = config_for(tmp_path, max_steps=2, eval_steps=1, learning_rate=1e-9, eval_on_start=True)
    trainer = Trainer(
        tiny_bert,
        train_lists,
        eval=eval_lists,
        config=config,
        callbacks=[lambda event: seen.append(event)],
    )
    result = trainer.train()
    evaluations = [event for event in seen if event.name == "evaluate"]
    assert [event.step for event in evaluations] == [0, 1, 2]
    before = RerankingEvaluator(eval_lists)(CrossEncoder(tiny_bert, device="cpu"))
    assert evaluations[0].values["ndcg@10"] == pytest.approx(before["ndcg@10"])
    assert result.best_step == 1
    off = config_for(tmp_path / "off", max_steps=1, eval_on_start=False)
    Trainer(tiny_bert, train_lists, eval=eval_lists, config=off).train()
    assert [row["step"] for row in log_rows(tmp_path / "off") if "ndcg@10" in row] == [1]


@pytest.mark.parametrize(
    "settings", [{}, {"ema_decay": 0.5}, {"lora_rank": 2}, {"precision": "bf16-pure"}]
)
@pytest.mark.parametrize("load_best", [True, False])
def test_the_model_in_memory_is_the_best_or_the_last(
    load_best: bool, settings: dict[str, Any],
    tiny_bert: Path, train_lists: Dataset, eval_lists: Dataset, tmp_path: Path,
):  # fmt: skip
    if "lora_rank" in settings:
        pytest.importorskip("peft")

    class Falling:
        """Every evaluation is worse than the one before."""

        value = 1.0

        def __call__(self, model: CrossEncoder) -> dict[str, float]:
            self.value /= 2
            return {"ndcg@10": self.value}

    model = CrossEncoder(tiny_bert, device="cpu")
    config = config_for(
        tmp_path,
        max_steps=4,
        eval_steps=2,
        save_steps=4,
        warmup_ratio=0.0,
        load_best=load_best,
        **settings,
    )
    result = Trainer(model, train_lists, evaluator=Falling(), config=config).train()
    assert (result.best_step, result.steps) == (2, 4)
    saved, left = weights(tmp_path), model.model.state_dict()
    assert saved.keys() == left.keys()
    same = all(torch.equal(saved[name].float(), left[name].float()) for name in saved)
    assert same == load_best
    assert not model.training
    pairs = [("what is the panda", "panda rain"), ("what is the panda", "bear")]
    if load_best:
        expected = CrossEncoder(tmp_path, device="cpu").predict(pairs)
        assert model.predict(pairs) == pytest.approx(expected, abs=1e-6)


def test_the_activation_is_kept_that_the_model_came_with(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path
):
    """Training is of raw scores, through either door: what predict applies to them is not its
    business.
    """
    for name, activation in {"asked": nn.Tanh(), "left": None, "none": nn.Identity()}.items():
        model = CrossEncoder(tiny_bert, device="cpu", activation_fn=activation)
        Trainer(model, train_lists, config=config_for(tmp_path / name, max_steps=1)).train()
        kind = type(activation or nn.Sigmoid())
        assert isinstance(model.activation_fn, kind)
        assert isinstance(CrossEncoder(tmp_path / name, device="cpu").activation_fn, kind)
        assert f"`{kind.__name__}` is applied to it" in (tmp_path / name / "README.md").read_text()
    again = CrossEncoder(tmp_path / "asked", device="cpu")
    Trainer(again, train_lists, config=config_for(tmp_path / "twice", max_steps=1)).train()
    assert isinstance(CrossEncoder(tmp_path / "twice", device="cpu").activation_fn, nn.Tanh)


class Errors:
    """An evaluator of a user's own: the fewer the better."""

    greater_is_better = False

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, model: CrossEncoder) -> dict[str, float]:
        return {"errors": self.values.pop(0)}


def test_any_metric_of_any_evaluator_chooses_the_model(
    tiny_bert: Path, train_lists: Dataset, eval_lists: Dataset, tmp_path: Path
):
    config = config_for(tmp_path / "own", metric_for_best="errors", max_steps=3, eval_steps=1)
    evaluator = Errors(3.0, 1.0, 2.0)
    result = Trainer(tiny_bert, train_lists, evaluator=evaluator, config=config).train()
    assert (result.best_step, result.metrics) == (2, {"errors": 1.0})
    for name, beside in {"R@2": None, "eval_R@2": Errors(1.0, 1.0)}.items():
        config = config_for(tmp_path / name, metric_for_best=name, max_steps=1, eval_steps=1)
        trainer = Trainer(tiny_bert, train_lists, eval=eval_lists, evaluator=beside, config=config)
        assert name in trainer.train().metrics


@pytest.mark.parametrize(
    "name", ["ndcg@", "x_map", "R@", "eval_loss_", "NanoBEIR_R100_mean_ndcg@10"]
)
def test_a_metric_that_no_evaluator_gives_is_refused(
    name: str, tiny_bert: Path, train_lists: Dataset, eval_lists: Dataset, tmp_path: Path
):
    config = config_for(tmp_path / "run", metric_for_best=name, max_steps=1, eval_on_start=True)
    with pytest.raises(
        ValueError, match=rf"^metric_for_best is {name}, but there are map, mrr@10, ndcg@10"
    ):
        Trainer(tiny_bert, train_lists, eval=eval_lists, config=config)
    trainer = Trainer(tiny_bert, train_lists, evaluator=Errors(1.0), config=config)
    with pytest.raises(ValueError, match=rf"^metric_for_best is {name}, but there are errors"):
        trainer.train()  # before its first step
    assert not (tmp_path / "run" / "train_log.jsonl").exists()
