"""Truncated pairs are said once for a model and a max_length, and counted."""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rerank_fast import CrossEncoder
from rerank_fast.evaluation import RerankingEvaluator
from tests.model_factory import make_tiny_bert

LONG = "the sea is wet and " * 100
PAIRS = [("rain", "sea"), ("rain", LONG)] * 5 + [(LONG, LONG), ("rain", "the " * 60), ("", "")]


@pytest.fixture
def model(tmp_path: Path) -> CrossEncoder:
    return CrossEncoder(make_tiny_bert(tmp_path / "bert"), device="cpu")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.message.split(";")[0] for record in caplog.records if "truncated" in record.message
    ]


def test_once_for_a_model_and_a_max_length(
    model: CrossEncoder, monkeypatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("rerank_fast.model.tokens.tokenization.CHUNK", 4)
    assert model.truncated_pairs == {}
    assert model.tokenize([("rain", "the " * 60)]).lengths.tolist() == [64]  # all that fit
    assert model.truncated_pairs.get(64, 0) == 0
    model.predict(PAIRS)
    assert said(caplog) == ["6 of 13 pairs are longer than max_length=64 tokens and were truncated"]
    assert model.truncated_pairs[64] == 6
    model.predict(PAIRS)
    model.tokenize(PAIRS)
    model.rank("rain", [LONG])
    model.preprocess(PAIRS)
    RerankingEvaluator([{"query": "rain", "docs": ["sea", LONG], "labels": [1, 0]}])(model)
    assert len(said(caplog)) == 1
    assert model.truncated_pairs[64] == 6 * 4 + 1 + 1
    model.max_length = 32
    model.predict(PAIRS)
    assert said(caplog)[1:] == [
        "7 of 13 pairs are longer than max_length=32 tokens and were truncated"
    ]
    assert (model.truncated_pairs[64], model.truncated_pairs[32]) == (26, 7)
    model.max_length = 64
    model.predict(PAIRS)
    assert len(said(caplog)) == 2


def test_another_model_says_it_again(model: CrossEncoder, caplog: pytest.LogCaptureFixture):
    model.predict(PAIRS)
    other = copy.deepcopy(model)
    assert other.truncated_pairs == {}
    other.predict(PAIRS)
    assert len(said(caplog)) == 2
    assert model.truncated_pairs == other.truncated_pairs == {64: 6}


def test_threads_count_together(model: CrossEncoder, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: model.tokenize(PAIRS), range(40)))
    assert model.truncated_pairs == {64: 240}
    assert len(said(caplog)) == 1
