"""Code that holds a CrossEncoder of sentence-transformers works with this package's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder.evaluation import (
    CrossEncoderClassificationEvaluator,
    CrossEncoderCorrelationEvaluator,
    CrossEncoderRerankingEvaluator,
)
from torch import nn

from rerank_fast import CrossEncoder
from tests.model_factory import make_tiny_bert

PAIRS = [("what is a panda", "a bear"), ("rain", ""), ("the sea", "the wind and the rain in paris")]
DOCUMENTS = ["a bear", "the sea", "a panda is a kind of bear"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[CrossEncoder, Any]:
    root = tmp_path_factory.mktemp("models")
    path = str(make_tiny_bert(root / "bert"))
    peer = PeerCrossEncoder(
        path, device="cpu", prompts={"web": "query about ", "none": ""}, default_prompt_name="none"
    )
    peer.save_pretrained(str(root / "saved"))
    return CrossEncoder(root / "saved", device="cpu"), PeerCrossEncoder(
        str(root / "saved"), device="cpu"
    )


CALLS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model.predict(PAIRS),
    "one pair": lambda model: model.predict(PAIRS[0]),
    "no pair": lambda model: model.predict([]),
    "positions": lambda model: model.predict(
        PAIRS, None, "web ", 2, False, nn.Tanh(), False, False, True
    ),
    "prompt_name": lambda model: model.predict(PAIRS, prompt_name="web"),
    "prompt": lambda model: model.predict(PAIRS, prompt="query "),
    "both": lambda model: model.predict(PAIRS, prompt="query ", prompt_name="web"),
    "apply_softmax": lambda model: model.predict(PAIRS, apply_softmax=True),
    "num_workers": lambda model: model.predict(PAIRS, num_workers=2, batch_size=1),
    "activation_fn": lambda model: model.predict(PAIRS, activation_fn=nn.Identity()),
    "activation over labels": lambda model: model.predict(PAIRS, activation_fn=nn.Softmax(dim=-1)),
    "activation of a column": lambda model: model.predict(
        PAIRS, activation_fn=lambda scores: scores[:, 0].exp()
    ),
    "activation_fct": lambda model: model.predict(PAIRS, activation_fct=nn.Identity()),
    "inputs": lambda model: model.predict(inputs=PAIRS),
    "sentences": lambda model: model.predict(sentences=PAIRS, show_progress_bar=False),
    "a tensor": lambda model: model.predict(PAIRS, convert_to_tensor=True),
    "a list": lambda model: model.predict(PAIRS, convert_to_numpy=False),
    "both converted": lambda model: model.predict(
        PAIRS, convert_to_tensor=True, convert_to_numpy=True
    ),
    "one tensor": lambda model: model.predict(PAIRS[0], convert_to_numpy=False),
    "no device": lambda model: model.predict(PAIRS, device=None, pool=None, chunk_size=None),
    "rank": lambda model: model.rank("what is a panda", DOCUMENTS),
    "rank positions": lambda model: model.rank(
        "rain", DOCUMENTS, 2, True, None, "web ", 1, False, nn.Tanh()
    ),
    "rank by name": lambda model: model.rank(
        "rain", DOCUMENTS, prompt_name="web", return_documents=True
    ),
    "rank as before": lambda model: model.rank(
        "rain",
        DOCUMENTS,
        num_workers=0,
        activation_fct=nn.Identity(),
        apply_softmax=True,
        convert_to_tensor=True,
    ),
}


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, torch.Tensor | np.ndarray | np.generic | float):
        assert type(found) is type(expected)
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-6)
    else:
        assert found == expected


@pytest.mark.parametrize("name", CALLS)
def test_calls_give_what_theirs_give(name: str, models: tuple[CrossEncoder, Any]):
    ours, theirs = models
    same(CALLS[name](ours), CALLS[name](theirs))


@pytest.mark.parametrize("method", ["predict", "rank"])
def test_arguments_stand_where_theirs_stand(method: str):
    ours, theirs = (
        inspect.signature(getattr(kind, method)).parameters
        for kind in (CrossEncoder, PeerCrossEncoder)
    )
    expected = [name for name in theirs if name not in ("device", "pool", "chunk_size", "kwargs")]
    assert list(ours) == expected


ITERABLES: dict[str, Callable[[], Any]] = {
    "a Series of pairs": lambda: pd.Series(PAIRS),
    "a Series with an index of its own": lambda: pd.Series(PAIRS, index=[7, 3, 3]),
    "a DataFrame": lambda: pd.DataFrame(PAIRS, columns=["left", "right"]),
    "a DataFrame by names": lambda: pd.DataFrame(
        {
            "n": [1, 2, 3],
            "document": [pair[1] for pair in PAIRS],
            "query": [pair[0] for pair in PAIRS],
        }
    ),
    "columns that are zipped": lambda: zip(*zip(*PAIRS, strict=True), strict=True),
    "Series that are zipped": lambda: zip(
        *(pd.Series(side) for side in zip(*PAIRS, strict=True)), strict=True
    ),
    "a generator": lambda: (pair for pair in PAIRS),
    "a generator of lists": lambda: ([query, document] for query, document in PAIRS),
    "a map": lambda: map(tuple, PAIRS),
    "an array": lambda: np.array(PAIRS),
    "an array of objects": lambda: np.array(PAIRS, dtype=object),
    "a column": lambda: Dataset.from_dict({"pair": [list(pair) for pair in PAIRS]})["pair"],
    "items": lambda: dict(PAIRS).items(),
}


@pytest.mark.parametrize("name", ITERABLES)
def test_pairs_of_any_kind(name: str, models: tuple[CrossEncoder, Any]):
    ours, _ = models
    same(ours.predict(ITERABLES[name]()), ours.predict(PAIRS))
    assert len(ours.tokenize(ITERABLES[name]())) == len(PAIRS)


@pytest.mark.parametrize(
    "kind", [iter, tuple, pd.Series, np.array, lambda texts: (text for text in texts)]
)
def test_documents_of_any_kind(kind: Callable[[Any], Any], models: tuple[CrossEncoder, Any]):
    ours, _ = models
    expected = ours.rank("rain", DOCUMENTS, return_documents=True)
    assert ours.rank("rain", kind(DOCUMENTS), return_documents=True) == expected


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"prompt_name": "no such"},
            ValueError,
            "there is no prompt 'no such': expected none, web",
        ),
        ({"device": "cuda:1"}, ValueError, "expected no device; model.to"),
        ({"pool": {}}, ValueError, "expected no pool"),
        (
            {"activation_fct": nn.Tanh(), "activation_fn": nn.Tanh()},
            TypeError,
            "both activation_fn and its older",
        ),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
    ids=str,
)
def test_what_is_not_served_is_said(
    options: dict[str, Any], kind: type[Exception], message: str, models: tuple[CrossEncoder, Any]
):
    with pytest.raises(kind, match=message):
        models[0].predict(PAIRS, **options)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": ["x"], "b": ["y"], "c": ["z"]}),
        pd.DataFrame({"a": ["x"]}),
        pd.DataFrame({"query": ["x"], "document": [float("nan")]}),
    ],
)
def test_tables_of_no_pairs_name_the_row(frame: pd.DataFrame, models: tuple[CrossEncoder, Any]):
    with pytest.raises(ValueError, match="pair 0"):
        models[0].predict(frame)


def test_an_older_name_is_said_once(
    models: tuple[CrossEncoder, Any], caplog: pytest.LogCaptureFixture
):
    from rerank_fast.model.calls import _say_older

    _say_older.cache_clear()
    for _ in range(3):
        models[0].predict(PAIRS, activation_fct=nn.Identity())
    assert [record.message for record in caplog.records] == [
        "CrossEncoder.predict: activation_fct is called activation_fn now."
    ]


SAMPLES = [
    {
        "query": "what is a panda",
        "positive": ["a panda is a kind of bear"],
        "negative": ["the sea", "rain"],
    },
    {
        "query": "rain",
        "positive": ["the wind and the rain"],
        "negative": ["a bear", "paris", "museum"],
    },
]
EVALUATORS: dict[str, Callable[[], Any]] = {
    "reranking": lambda: CrossEncoderRerankingEvaluator(SAMPLES, name="a", at_k=3),
    "correlation": lambda: CrossEncoderCorrelationEvaluator(PAIRS, [0.0, 0.5, 1.0], name="b"),
    "classification": lambda: CrossEncoderClassificationEvaluator(PAIRS, [0, 1, 1], name="c"),
}


@pytest.mark.parametrize("name", EVALUATORS)
def test_their_evaluators_run_on_our_model(
    name: str, models: tuple[CrossEncoder, Any], tmp_path: Path
):
    ours, theirs = models
    found = EVALUATORS[name]()(ours, output_path=str(tmp_path))
    expected = EVALUATORS[name]()(theirs)
    assert found == pytest.approx(expected, rel=1e-5)
    assert list(tmp_path.glob("*.csv"))
