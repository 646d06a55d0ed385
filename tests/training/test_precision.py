"""What `precision` comes to on a device, and which dtype a run's evaluations are scored in."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from rerank_fast import Trainer
from rerank_fast.evaluation import RerankingEvaluator
from rerank_fast.model.precision import hardware
from rerank_fast.training import checkpoints
from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.precision import products_in, settle
from tests.training.conftest import config_for

CPU = torch.device("cpu")


def set_speed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Of products in 16 bits; those in fp32 take 1."""
    known = {torch.float32: 1.0, torch.bfloat16: seconds, torch.float16: seconds}
    monkeypatch.setattr(hardware, "product_seconds", known.get)


@pytest.mark.parametrize(("seconds", "precision"), [(0.5, "bf16"), (5.0, "fp32")])
def test_auto_is_what_is_fast(seconds: float, precision: str, monkeypatch: pytest.MonkeyPatch):
    set_speed(monkeypatch, seconds)
    assert settle(TrainingConfig(), CPU, None).precision == precision


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_gpus(native: bool, precision: str, monkeypatch: pytest.MonkeyPatch):
    capability = (8, 0) if native else (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert settle(TrainingConfig(), torch.device("cuda"), None).precision == precision


def test_a_gpu_without_bf16_refuses_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Whichever GPU is the current one: it is the model's that is asked."""
    second = torch.device("cuda:1")
    known = {torch.device("cuda:0"): (9, 0), second: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", known.get)
    settle(TrainingConfig(precision="bf16"), torch.device("cuda:0"), None)
    expected = "precision must be fp16 or fp32 on cuda:1, got bf16: this GPU has no bf16 of its own"
    with pytest.raises(ValueError, match=expected):
        settle(TrainingConfig(precision="bf16"), second, None)
    assert settle(TrainingConfig(precision="fp16"), second, None).precision == "fp16"
    assert not caplog.records
    config = settle(TrainingConfig(precision="bf16-pure"), second, None)
    assert products_in(config, second) == torch.float32
    assert "bf16-pure is computed in float32" in caplog.text


def test_a_named_one_that_is_emulated_is_kept_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    set_speed(monkeypatch, 0.5)
    assert settle(TrainingConfig(precision="bf16"), CPU, None).precision == "bf16"
    assert not caplog.records
    monkeypatch.setattr(
        hardware, "product_seconds", {torch.float32: 0.001, torch.bfloat16: 0.005}.get
    )
    assert settle(TrainingConfig(precision="bf16"), CPU, None).precision == "bf16"
    assert [record.message for record in caplog.records] == [
        "precision bf16 is emulated, slower than fp32, on this processor: "
        "a product takes 5.00 ms in bfloat16, 1.00 ms in float32."
    ]


@pytest.mark.parametrize(
    ("precision", "seconds", "trained", "evaluated"),
    [
        ("bf16", 0.5, torch.bfloat16, torch.bfloat16),
        ("bf16", 5.0, torch.bfloat16, torch.float32),
        ("bf16-pure", 0.5, torch.bfloat16, torch.bfloat16),
        ("bf16-pure", 5.0, torch.float32, torch.float32),
        ("fp16", 5.0, torch.float16, torch.float32),
        ("fp32", 0.5, torch.float32, torch.float32),
    ],
)
def test_evaluations_are_scored_in_the_dtype_of_training(
    precision: str,
    seconds: float,
    trained: torch.dtype,
    evaluated: torch.dtype,
    still_bert: Path,
    train_lists: Dataset,
    eval_lists: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    set_speed(monkeypatch, seconds)
    seen = set()
    measure = RerankingEvaluator(eval_lists)

    def evaluator(model: object) -> dict[str, float]:
        seen.add(model.prepare(model.tokenize([("a", "b")])).dtype)
        return measure(model)

    config = config_for(tmp_path, precision=precision, max_steps=2, eval_steps=1)
    trainer = Trainer(still_bert, train_lists, evaluator=evaluator, config=config)
    assert trainer.backward.dtype == trained
    result = trainer.train()
    assert seen == {evaluated}
    assert trainer.evaluated_in == evaluated
    name = str(evaluated).removeprefix("torch.")
    assert f"Scores were computed in {name}." in (tmp_path / "README.md").read_text()
    # Beside the scores of fp32: the same up to rounding.
    exact = measure(trainer.model)
    assert result.metrics["ndcg@10"] == pytest.approx(exact["ndcg@10"], abs=0.05)


def test_a_resumed_run_keeps_its_precision_on_other_hardware(
    still_bert: Path, train_lists: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    set_speed(monkeypatch, 0.5)
    config = config_for(tmp_path, precision="auto", save_steps=2, max_steps=3, batch_size=4)
    first = Trainer(still_bert, train_lists, config=config)
    first.train()
    assert first.config.precision == "bf16"
    assert "- `precision`: bf16" in (tmp_path / "README.md").read_text().replace("`bf16`", "bf16")
    (newest,) = checkpoints.checkpoints(tmp_path)
    assert checkpoints.load_values(newest)["run"]["precision"] == "bf16"
    set_speed(monkeypatch, 5.0)
    again = Trainer(still_bert, train_lists, config=replace(config, resume="auto"))
    assert again.config.precision == "bf16"
    assert again.train().steps == 3


def test_what_auto_came_to_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        config = settle(TrainingConfig(), CPU, None)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(
        f"dtype auto: {'bfloat16' if config.precision == 'bf16' else 'float32'} on cpu: "
    )
