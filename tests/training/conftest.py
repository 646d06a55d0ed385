"""A tiny model and a task it can learn: the right document repeats the query's animal."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from rerank_fast import CrossEncoder, TrainingConfig
from tests.model_factory import make_tiny_bert

_OTHERS = ["bear", "fish"]


def make_lists(count: int, *, seed: int = 0) -> Dataset:
    """Lists of 3 to 6 documents of uneven length; at least one relevant, at least two not."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        labels = [1.0, 0.0, 0.0] + [float(draw.random() < 0.3) for _ in range(draw.randrange(4))]
        draw.shuffle(labels)
        words = ["weather", "rain", "sea", "museum", "city"]
        docs = [
            " ".join(
                [
                    "panda" if label else draw.choice(_OTHERS),
                    *draw.choices(words, k=draw.randrange(9)),
                ]
            )
            for label in labels
        ]
        rows.append({"query": "what is the panda", "docs": docs, "labels": labels})
    return Dataset.from_list(rows)


def config_for(directory: Path, **settings: object) -> TrainingConfig:
    quick = {
        "precision": "fp32",
        "batch_size": 8,
        "learning_rate": 1e-3,
        "eval_on_start": False,
        "logging_steps": 1,
        "save_steps": 999,
    }
    return TrainingConfig(output=str(directory), show_progress_bar=False, **{**quick, **settings})


def log_rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "train_log.jsonl").read_text().splitlines()]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return CrossEncoder(directory, device="cpu").model.state_dict()


def without_dropout(model: Path, copy: Path) -> Path:
    """The same model with both dropouts at 0."""
    opened = CrossEncoder(model, device="cpu")
    opened.model.config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    opened.save_pretrained(copy)
    return copy


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture(scope="session")
def still_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout: its scores don't depend on how a batch is cut."""
    return without_dropout(tiny_bert, tmp_path_factory.mktemp("still") / "bert")


@pytest.fixture(scope="session")
def train_lists() -> Dataset:
    return make_lists(48)


@pytest.fixture(scope="session")
def eval_lists() -> Dataset:
    return make_lists(24, seed=1)
