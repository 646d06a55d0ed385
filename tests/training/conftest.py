"""A tiny model and a task it can learn: the right document repeats the query's animal."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from datasets import Dataset

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
            " ".join(["panda" if label else draw.choice(_OTHERS), *draw.choices(words, k=draw.randrange(9))])
            for label in labels
        ]
        rows.append({"query": "what is the panda", "docs": docs, "labels": labels})
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture(scope="session")
def train_lists() -> Dataset:
    return make_lists(48)


@pytest.fixture(scope="session")
def eval_lists() -> Dataset:
    return make_lists(24, seed=1)
