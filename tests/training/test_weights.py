"""What a run does to the caller's model, and that nothing of it is left when the run is over."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from rerank_fast import CrossEncoder, Trainer
from rerank_fast.model.scoring import score
from rerank_fast.training.events import Event, TrainingInterrupted
from tests.training.conftest import config_for, make_lists

PAIRS = [("what is the panda", doc) for doc in ("panda rain", "bear", "fish sea city")]
ENDS = ["done", "interrupted", "failed"]


def train(model: CrossEncoder, directory: Path, end: str = "done", **settings: object) -> None:
    """A run of 3 steps that comes to its end, or to another in its second step."""

    def note(event: Event) -> None:
        if event.name == "step_end" and event.step == 2:
            if end == "interrupted":
                os.kill(os.getpid(), signal.SIGTERM)
            if end == "failed":
                raise ZeroDivisionError

    trainer = Trainer(
        model,
        make_lists(24),
        config=config_for(directory, max_steps=3, **settings),
        callbacks=[note],
    )
    if end == "done":
        trainer.train()
    else:
        with pytest.raises(TrainingInterrupted if end == "interrupted" else ZeroDivisionError):
            trainer.train()


@pytest.mark.parametrize("end", ENDS)
def test_a_model_of_bf16_weights_can_be_trained_by_others_again(
    end: str, still_bert: Path, tmp_path: Path
):
    model = CrossEncoder(still_bert, device="cpu")
    train(model, tmp_path / "first", end, precision="bf16-pure")
    assert not model.training
    # By a loop of one's own.
    score(model.prepare(model.tokenize(PAIRS))).sum().backward()
    gradients = {name: one.grad for name, one in model.model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    model.zero_grad()
    # By a second Trainer of either precision.
    for name, precision in (("pure", "bf16-pure"), ("fp32", "fp32")):
        before = {key: value.float() for key, value in model.model.state_dict().items()}
        train(model, tmp_path / name, precision=precision, warmup_ratio=0.0)
        after = model.model.state_dict()
        moved = [key for key in before if not torch.equal(before[key], after[key].float())]
        assert len(moved) > 0.8 * len(before), precision  # bf16 rounds some steps away


@pytest.mark.parametrize("end", ENDS)
def test_frozen_parameters_are_put_back_as_they_were_found(
    end: str, tiny_bert: Path, tmp_path: Path
):
    model = CrossEncoder(tiny_bert, device="cpu")
    model.model.bert.pooler.requires_grad_(False)
    found = {name: one.requires_grad for name, one in model.model.named_parameters()}
    train(model, tmp_path, end, freeze_layers=1, freeze=["*.1.output.*"])
    assert {name: one.requires_grad for name, one in model.model.named_parameters()} == found
    assert all(one.grad is None for one in model.parameters())


def test_freezing_all_is_refused_before_anything_is_frozen(tiny_bert: Path, tmp_path: Path):
    model = CrossEncoder(tiny_bert, device="cpu")
    with pytest.raises(ValueError, match="leaves no parameter"):
        Trainer(model, make_lists(4), config=config_for(tmp_path, freeze=["*"]))
    assert all(one.requires_grad for one in model.parameters())


def test_a_step_that_fails_leaves_no_gradients(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = CrossEncoder(tiny_bert, device="cpu")
    trainer = Trainer(model, make_lists(24), config=config_for(tmp_path, max_steps=3))

    def fail(*arguments: object) -> None:
        assert any(one.grad is not None for one in model.parameters())
        raise ZeroDivisionError

    monkeypatch.setattr(trainer.optimizer, "step", fail)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert all(one.grad is None for one in model.parameters())


def test_a_trainer_runs_once(tiny_bert: Path, tmp_path: Path):
    trainer = Trainer(
        tiny_bert, make_lists(24), config=config_for(tmp_path, max_steps=2, overwrite=True)
    )
    trainer.train()
    with pytest.raises(RuntimeError, match="make a new one"):
        trainer.train()


def test_an_object_that_is_no_model_of_this_package_is_refused_by_its_type(
    tiny_bert: Path, tmp_path: Path
):
    inner = CrossEncoder(tiny_bert, device="cpu").model
    with pytest.raises(
        ValueError, match=r"a rerank_fast\.CrossEncoder, .*got a transformers.*\.BertForSequence"
    ):
        Trainer(inner, make_lists(4), config=config_for(tmp_path))
    with pytest.raises(
        ValueError, match="expected a model's directory or a hub id, got a BertForSequence"
    ):
        CrossEncoder(inner)
