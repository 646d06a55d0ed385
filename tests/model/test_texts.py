"""Texts, labels and ids by every door: what is none is named before anything is scored, NumPy's are
taken.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from rerank_fast import CrossEncoder
from rerank_fast.data import ListStream, load_lists
from rerank_fast.data.mining.sources import load_collection
from rerank_fast.evaluation import RerankingEvaluator, ranking_metrics
from rerank_fast.losses import LambdaLoss
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.texts import check_pairs
from tests.model_factory import make_tiny_bert

LABELS = [1.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return CrossEncoder(make_tiny_bert(tmp_path_factory.mktemp("model")), device="cpu")


def sample(query: Any, docs: Any) -> dict[str, Any]:
    return {"query": query, "positive": [docs[0]], "negative": list(docs[1:])}


# Each takes two queries and their documents, three each.
DOORS: dict[str, Callable[[CrossEncoder, list[Any], list[Any]], Any]] = {
    "predict": lambda model, queries, docs: model.predict(
        [(query, one) for query, all_docs in zip(queries, docs, strict=True) for one in all_docs]
    ),
    "tokenize": lambda model, queries, docs: model.tokenize(
        [(query, one) for query, all_docs in zip(queries, docs, strict=True) for one in all_docs]
    ),
    "rank": lambda model, queries, docs: [
        model.rank(*one) for one in zip(queries, docs, strict=True)
    ],
    "rank_many": lambda model, queries, docs: model.rank_many(queries, docs),
    "lists": lambda model, queries, docs: RerankingEvaluator(
        [{"query": q, "docs": d, "labels": LABELS} for q, d in zip(queries, docs, strict=True)]
    )(model),
    "samples": lambda model, queries, docs: RerankingEvaluator(list(map(sample, queries, docs)))(
        model
    ),
    "load_lists": lambda model, queries, docs: load_lists(
        [{"query": q, "docs": d, "labels": LABELS} for q, d in zip(queries, docs, strict=True)]
    ).to_list(),
    "ListStream": lambda model, queries, docs: list(
        ListStream(
            [{"query": q, "docs": d, "labels": LABELS} for q, d in zip(queries, docs, strict=True)]
        )
    ),
    "mining": lambda model, queries, docs: load_collection(
        [{"query": q, "docs": d, "labels": LABELS} for q, d in zip(queries, docs, strict=True)]
    ),
    "drop-in": lambda model, queries, docs: LambdaLoss(model)(
        [queries, docs], [torch.tensor(LABELS)] * 2
    ).item(),
}
NO_TEXTS = {
    "None": (None, "expected a string, got NoneType None"),
    "number": (3, "expected a string, got int 3"),
    "NumPy number": (np.float32(1.5), r"expected a string, got float32 np\.float32\(1\.5\)"),
    "bytes": (b"sea", "expected a string, got bytes b'sea'"),
    "surrogate": ("sea \ud800", "not valid Unicode: .*ud800"),
    "surrogate in an array": (np.array("sea \udfff"), "not valid Unicode: .*udfff"),
}


@pytest.mark.parametrize("no_text", NO_TEXTS)
@pytest.mark.parametrize("at", ["query", "document"])
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_text_is_named_before_anything_is_scored(
    model: CrossEncoder, monkeypatch: pytest.MonkeyPatch, door: str, at: str, no_text: str
):
    def scored(*_: Any) -> Any:
        raise AssertionError("a pair was scored")

    if door != "rank":  # which is called for one query after the other
        monkeypatch.setattr(PackedPairs, "__call__", scored)
    value, message = NO_TEXTS[no_text]
    queries: list[Any] = ["what is a panda", "rain"]
    docs: list[Any] = [["bear", "fish", "sea"], ["sun", "wind", "city"]]
    if at == "query":
        queries[1] = value
        place = {"predict": "pair 3, query", "tokenize": "pair 3, query", "rank": "query 0"}.get(
            door, "1.*query|query 1"
        )
    else:
        docs[1][2] = value
        place = {
            "predict": "pair 5, document",
            "tokenize": "pair 5, document",
            "rank": "query 0, document 2",
        }.get(door, r"1.*(docs\[2\]|negative\[1\]|document 2)")
    with pytest.raises(ValueError, match=rf"({place}).*{message}"):
        DOORS[door](model, queries, docs)


NUMPY: dict[str, tuple[Callable[[str], Any], Callable[[list[str]], Any]]] = {
    "str_": (np.str_, lambda docs: [np.str_(one) for one in docs]),
    "0-d arrays": (np.array, lambda docs: [np.array(one) for one in docs]),
    "arrays": (np.str_, np.array),
    "object arrays": (np.str_, lambda docs: np.array(docs, dtype=object)),
    "tuples": (str, tuple),
}


@pytest.mark.parametrize("kind", NUMPY)
@pytest.mark.parametrize("door", DOORS)
def test_numpys_texts_are_taken(model: CrossEncoder, door: str, kind: str):
    queries, docs = ["what is a panda", "rain"], [["bear", "fish", "sea"], ["sun", "wind", "city"]]
    expected = DOORS[door](model, queries, docs)
    text, texts = NUMPY[kind]
    found = DOORS[door](model, [text(one) for one in queries], [texts(one) for one in docs])
    if isinstance(expected, np.ndarray | float):
        np.testing.assert_array_equal(found, expected)
    elif door == "tokenize":
        np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    else:
        assert found == expected
    if door == "load_lists":
        assert type(found[0]["query"]) is type(found[0]["docs"][0]) is str


@pytest.mark.parametrize(
    "labels",
    [
        np.array(LABELS, np.float32),
        np.array([1, 0, 0]),
        np.array([True, False, False]),
        [np.float32(1), np.float64(0), np.int64(0)],
        [np.array(1.0), np.array(0), np.bool_(False)],
        [torch.tensor(1), torch.tensor(0.0), False],
        torch.tensor(LABELS),
        np.array([1.0, 0, 0], dtype=object),
        (1, 0, 0),
    ],
    ids=repr,
)
def test_numpys_numbers_are_taken_for_labels(model: CrossEncoder, labels: Any):
    docs = ["bear", "fish", "sea"]
    row = {"query": "panda", "docs": docs, "labels": labels}
    assert load_lists([row])[0]["labels"] == LABELS
    assert load_collection([row]).positives == [{0: 1.0}]
    assert RerankingEvaluator([row])(model) == RerankingEvaluator([{**row, "labels": LABELS}])(
        model
    )
    assert ranking_metrics([labels], [[3, 2, 1]])["map"] == [1.0]
    loss = LambdaLoss(model.eval())
    expected = loss([["panda"], [docs]], [torch.tensor(LABELS)])
    assert loss([["panda"], [docs]], [labels]).item() == expected.item()


def test_numpys_ids_are_taken():
    corpus = [{"_id": np.int64(7), "text": "bear"}, {"_id": np.str_("x"), "text": "fish"}]
    for ids in (
        [np.int64(7), np.str_("x")],
        np.array([7, "x"], dtype=object),
        np.array(["7", "x"]),
    ):
        found = load_collection([{"query": "panda", "positive_ids": ids}], corpus)
        assert found.positives == [{0: 1.0, 1: 1.0}]
    found = load_collection(
        [{"query": "panda", "positive_ids": np.array([1])}], np.array(["bear", "fish"])
    )
    assert found.corpus == ["bear", "fish"]
    assert found.positives == [{1: 1.0}]
    assert load_collection(
        [{"query": "q", "positive_ids": np.int64(7)}], {7: "bear"}
    ).positives == [{0: 1.0}]
    assert load_collection([{"query": "q", "positives": np.array(["bear"])}]).positives == [
        {0: 1.0}
    ]


@pytest.mark.parametrize("format", [None, "numpy", "torch"])
def test_datasets_of_any_format_are_evaluated(model: CrossEncoder, format: str | None):
    rows = [{"query": "panda", "docs": ["bear", "fish", "sea"], "labels": LABELS}]
    expected = RerankingEvaluator(rows)(model)
    assert RerankingEvaluator(Dataset.from_list(rows).with_format(format))(model) == expected
    samples = [sample("panda", ["bear", "fish", "sea"])]
    expected = RerankingEvaluator(samples)(model)
    assert RerankingEvaluator(Dataset.from_list(samples).with_format(format))(model) == expected
    assert RerankingEvaluator(np.array(samples))(model) == expected


@pytest.mark.parametrize(
    "pairs", [None, 3, "ab", b"ab", {"a": "b"}, np.array("ab"), np.float32(1)], ids=repr
)
def test_what_are_no_pairs(model: CrossEncoder, pairs: Any):
    for method in (model.predict, model.tokenize):
        with pytest.raises(ValueError, match=r"expected pairs \(query, document\), got"):
            method(pairs)


@pytest.mark.parametrize(
    "pair",
    [None, 3, "ab", ("a",), ("a", "b", "c"), {"a", "b"}, {"a": 1, "b": 2}],
    ids=["None", "3", "ab", "one", "three", "set", "dict"],
)
def test_what_is_no_pair(model: CrossEncoder, pair: Any):
    with pytest.raises(ValueError, match=r"pair 1: expected \(query, document\), got"):
        model.predict([("a", "b"), pair, ("a", "b")])


def test_pairs_of_any_iterable(model: CrossEncoder):
    pairs = [("panda", "bear"), ("rain", "sea"), ("sun", "wind")]
    expected = model.predict(pairs)
    for other in (
        np.array(pairs),
        np.array(pairs, dtype=object),
        iter(pairs),
        [np.array(one) for one in pairs],
    ):
        np.testing.assert_array_equal(model.predict(other), expected)
    assert model.predict((np.array("panda"), np.str_("bear"))) == model.predict(("panda", "bear"))
    assert list(map(tuple, check_pairs(np.array(pairs)))) == pairs


@pytest.mark.parametrize(
    ("queries", "docs", "options", "message"),
    [
        (None, [["a"]], {}, "expected a list of queries, got NoneType None"),
        ("a", [["a"]], {}, "expected a list of queries, got str 'a'"),
        (["a"], None, {}, "expected a list of documents a query, got NoneType None"),
        (["a"], [None], {}, "query 0: expected a list of documents, got NoneType None"),
        (["a"], ["bc"], {}, "query 0: expected a list of documents, got str 'bc'"),
        (["a"], [{"b": "c"}], {}, "query 0: expected a list of documents, got dict"),
        (["a"], [3], {}, "query 0: expected a list of documents, got int 3"),
        (["a"], [["b"]], {"top_k": 0}, "top_k must be None or at least 1, got 0"),
        (["a"], [["b"]], {"top_k": "3"}, "top_k must be None or at least 1, got '3'"),
        (["a"], [["b"]], {"top_k": 1.5}, "top_k must be None or at least 1, got 1.5"),
        (["a"], [["b"]], {"batch_size": "3"}, "batch_size must be at least 1, got '3'"),
        (["a"], [["b"]], {"prompt": 3}, "prompt: expected a string, got int 3"),
        (["a"], [["b"]], {"prompt": "\ud800"}, "prompt: not valid Unicode"),
    ],
)
def test_what_can_not_be_ranked(
    model: CrossEncoder, queries: Any, docs: Any, options: Any, message: str
):
    with pytest.raises(ValueError, match=message):
        model.rank_many(queries, docs, **options)


@pytest.mark.parametrize(
    ("documents", "labels", "message"),
    [
        (["bear"], [torch.tensor(LABELS)], "query 0: expected a list of documents, got str 'bear'"),
        (
            [["a", "b", "c"]],
            [1.0],
            "the labels of query 0: expected a label for each document, got float 1.0",
        ),
        (
            [["a", "b", "c"]],
            [torch.tensor(1.0)],
            "the labels of query 0: expected a label for each document",
        ),
        (
            [["a", "b", "c"]],
            [[1, None, 0]],
            r"the labels of query 0\[1\]: expected a number, got NoneType None",
        ),
        (
            [["a", "b", "c"]],
            [[1, "2", 0]],
            r"the labels of query 0\[1\]: expected a number, got str '2'",
        ),
        (
            [["a", "b", "c"]],
            [None],
            "the labels of query 0: expected a label for each document, got NoneType",
        ),
    ],
)
def test_what_the_drop_in_can_not_read(
    model: CrossEncoder, documents: Any, labels: Any, message: str
):
    with pytest.raises(ValueError, match=message):
        LambdaLoss(model)([["panda"], documents], labels)


@pytest.mark.parametrize("labels", [["a", "b"], [None, {}], [[1], [2, 3]]], ids=str)
def test_labels_that_are_no_numbers_are_named(labels: Any):
    with pytest.raises(ValueError, match="list 1"):
        ranking_metrics([[1, 0], labels], [[1, 2], [1, 2]])


def test_a_saved_list_of_numpys_texts_reads_back(tmp_path: Path):
    rows = [
        {
            "query": np.str_("q"),
            "docs": np.array(["a", "b"]),
            "labels": np.array([1.5, 0], np.float32),
        }
    ]
    load_lists(rows).save_to_disk(tmp_path / "saved")
    assert load_lists(tmp_path / "saved").to_list() == [
        {"query": "q", "docs": ["a", "b"], "labels": [1.5, 0.0]}
    ]
