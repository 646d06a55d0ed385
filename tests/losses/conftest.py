"""A tiny model of sentence-transformers, without dropout: the two packages draw theirs in another
order.
"""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.cross_encoder import CrossEncoder

from tests.model_factory import make_tiny_bert

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_bert(tmp_path_factory.mktemp("model") / "bert"))


@pytest.fixture
def model(directory: str) -> CrossEncoder:
    torch.manual_seed(0)
    return CrossEncoder(directory, num_labels=1, device="cpu", config_kwargs=STILL)
