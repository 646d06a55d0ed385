"""Which documents become negatives: hand-computed, and beside sentence-transformers'
mine_hard_negatives.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers.util import cos_sim
from sentence_transformers.util import mine_hard_negatives as peer_mine

from rerank_fast.data import BM25Retriever, DenseRetriever, load_lists, mine_hard_negatives
from rerank_fast.data.mining.bm25 import _top_k
from tests.data.mining.stubs import FixedCrossEncoder, FixedEncoder, by_query, read

DOCUMENTS = [f"document {i}" for i in range(60)]
QUERIES = [f"query {i}" for i in range(20)]
# One to three positives a query, some shared; two of them are not in the corpus.
PAIRS = [
    (query, DOCUMENTS[(7 * i + 3 * j) % 60])
    for i, query in enumerate(QUERIES)
    for j in range(1 + i % 3)
]
PAIRS += [("query 0", "outside the corpus"), ("query 5", "also outside")]
TEXTS = [*DOCUMENTS, *QUERIES, *(positive for _, positive in PAIRS)]


def mine(
    tmp_path: Path, encoder: FixedEncoder | None = None, **options: Any
) -> dict[str, dict[str, float]]:
    rows = [{"query": query, "positive": positive} for query, positive in PAIRS]
    output = tmp_path / "ours.jsonl"
    mine_hard_negatives(
        rows, DOCUMENTS, output=output, retriever=encoder or FixedEncoder(TEXTS), overwrite=True,
        show_progress_bar=False, **options,
    )  # fmt: skip
    return by_query(output)


def peer(cross_encoder: Any = None, **options: Any) -> dict[str, dict[str, float]]:
    """Their rows, one per positive, as query -> document -> score."""
    dataset = Dataset.from_dict(
        {"query": [pair[0] for pair in PAIRS], "positive": [pair[1] for pair in PAIRS]}
    )
    rows = peer_mine(
        dataset, FixedEncoder(TEXTS), corpus=DOCUMENTS, cross_encoder=cross_encoder, verbose=False,
        output_format="labeled-list", output_scores=True, **options,
    )  # fmt: skip
    merged: dict[str, dict[str, float]] = {}
    for row in rows:
        merged.setdefault(row["query"], {}).update(zip(row["positive"], row["scores"], strict=True))
    return merged


FILTERS: list[dict[str, Any]] = [
    {},
    {"num_negatives": 5, "range_min": 4},
    {"num_negatives": 2, "range_min": 3, "range_max": 9},
    {"num_negatives": 70},
    {"max_score": 0.4},
    {"min_score": 0.3, "num_negatives": 30},
    {"absolute_margin": 0.1},
    {"absolute_margin": -0.3, "range_min": 2},
    {"relative_margin": 0.05},
    {"relative_margin": 0.5, "max_score": 0.3, "min_score": -0.2, "range_min": 1, "range_max": 40},
]


@pytest.mark.parametrize("options", FILTERS)
def test_negatives_and_scores_are_sentence_transformers_own(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    options = {"num_negatives": 3, **options}
    expected = peer(**options)
    got = mine(tmp_path, labels="scores", query_batch_size=7, **options)
    assert {query: set(docs) for query, docs in got.items()} == {
        q: set(docs) for q, docs in expected.items()
    }
    assert list(got) == list(expected)
    for query, docs in expected.items():
        assert got[query] == pytest.approx(docs, abs=1e-6)
    if options.get("relative_margin") == 0.5:
        assert len(expected) < len(QUERIES)  # the filters are strict enough to matter


@pytest.mark.parametrize("options", FILTERS)
def test_rescored_negatives_are_sentence_transformers_own(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    options = {"num_negatives": 3, **options}
    if not {"max_score", "min_score", "absolute_margin", "relative_margin"} & options.keys():
        options["max_score"] = 100.0  # without a filter theirs does not rescore
    expected = peer(FixedCrossEncoder(), **options)
    got = mine(tmp_path, labels="scores", cross_encoder=FixedCrossEncoder(), **options)
    assert {query: set(docs) for query, docs in got.items()} == {
        q: set(docs) for q, docs in expected.items()
    }
    for query, docs in expected.items():
        assert got[query] == pytest.approx(docs, abs=1e-6)


@pytest.mark.parametrize("block", [1 << 8, 1 << 25])
def test_faiss_and_blocks_find_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("rerank_fast.data.mining.dense._SIMILARITIES", block)
    expected = mine(tmp_path, range_min=2, relative_margin=0.1)
    pytest.importorskip("faiss")
    retriever: Any = DenseRetriever(FixedEncoder(TEXTS), use_faiss=True)
    assert mine(tmp_path, retriever, range_min=2, relative_margin=0.1) == expected


def test_random_sampling_is_seeded_and_within_the_range(tmp_path: Path) -> None:
    options: dict[str, Any] = {"range_min": 5, "range_max": 25, "max_score": 0.9}
    pool = mine(tmp_path, num_negatives=20, **options)
    first = mine(tmp_path, num_negatives=4, sampling_strategy="random", seed=1, **options)
    assert first == mine(
        tmp_path, num_negatives=4, sampling_strategy="random", seed=1, query_batch_size=3, **options
    )
    assert first != mine(tmp_path, num_negatives=4, sampling_strategy="random", seed=2, **options)
    drawn = set()
    for query, docs in first.items():
        assert docs.items() <= pool[query].items()
        assert sum(label == 0 for label in docs.values()) == 4
        negatives = [doc for doc, label in pool[query].items() if label == 0]
        drawn |= {negatives.index(doc) for doc, label in docs.items() if label == 0}
    assert len(drawn) > 15  # from the whole pool, not from one end of it


def test_documents_are_in_an_order_that_tells_nothing(tmp_path: Path) -> None:
    mine(tmp_path, num_negatives=9)
    rows = read(tmp_path / "ours.jsonl")
    places = [
        i / (len(row["labels"]) - 1)
        for row in rows
        for i, label in enumerate(row["labels"])
        if label
    ]
    assert 0.35 < float(np.mean(places)) < 0.65
    again = mine(tmp_path, num_negatives=9)
    assert [row["docs"] for row in rows] == [list(docs) for docs in again.values()]


# -- BM25 -----------------------------------------------------------------------------------------

CORPUS = {
    "a": "berlin has a wall",
    "b": "berlin berlin berlin",
    "c": "paris has a tower",
    "d": "berlin has a wall",  # a's text
    "e": "a wall is a wall",
    "f": "bamboo for pandas",
}


def bm25_score(query: str, document: str) -> float:
    """Lucene's BM25, written from its formula, over CORPUS's five distinct texts without stop
    words.
    """
    stop = {"a", "is", "for", "has"}
    texts = [
        [word for word in text.split() if word not in stop]
        for text in dict.fromkeys(CORPUS.values())
    ]
    words = [word for word in document.split() if word not in stop]
    average = sum(map(len, texts)) / len(texts)
    total = 0.0
    for term in query.split():
        df = sum(term in text for text in texts)
        tf = words.count(term)
        idf = np.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(words) / average))
    return total


@pytest.mark.parametrize("output", ["lists.jsonl", "lists.parquet"])
def test_bm25_by_hand(tmp_path: Path, output: str) -> None:
    rows = [
        {"query": "berlin wall", "positive_ids": ["a"]},
        {"query": "bamboo", "positive_ids": "f"},
    ]
    retriever = BM25Retriever(stopwords=["a", "is", "for", "has"])
    result = mine_hard_negatives(
        rows,
        CORPUS,
        output=tmp_path / output,
        retriever=retriever,
        labels="scores",
        show_progress_bar=False,
    )
    lists = load_lists(tmp_path / output)
    # The text of a is never a negative; paris and pandas share no term; bamboo has no other
    # document.
    assert len(lists) == 1
    got = dict(zip(lists[0]["docs"], lists[0]["labels"], strict=True))
    expected = {CORPUS[key]: bm25_score("berlin wall", CORPUS[key]) for key in "abe"}
    assert got == pytest.approx(expected, rel=1e-5)
    counts = (
        result.lists,
        result.documents,
        result.duplicate_documents,
        result.queries_without_negative,
    )
    assert counts == (1, 5, 1, 1)
    assert (result.positives, result.negatives, result.lists_with_fewer_negatives) == (1, 2, 1)


def test_bm25_finds_what_all_scores_sorted_give(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    words = [f"w{i}" for i in range(80)]
    texts = list(
        dict.fromkeys(" ".join(draw.choice(words, draw.integers(2, 9))) for _ in range(700))
    )
    queries = [" ".join(draw.choice(words, 3)) for _ in range(30)] + ["unknown terms"]
    retriever = BM25Retriever(stopwords=None)
    retriever.index(texts, queries, show_progress_bar=False)
    found = retriever.search(0, 31, 40, [[i] for i in range(31)])
    scores = retriever._bm25
    for row, query in enumerate(queries[:30]):
        every = scores.get_scores([word for word in query.split() if word in scores.vocab_dict])
        order = [i for i in np.argsort(-every, kind="stable")[:40] if every[i] > 0]
        assert found.indices[row].tolist() == order + [-1] * (40 - len(order))
        np.testing.assert_array_equal(found.scores[row, : len(order)], every[order])
        assert found.positive_scores[row] == [every[row]]
    assert set(found.indices[30]) == {-1}


def test_top_k_with_ties_of_any_shape() -> None:
    draw = np.random.default_rng(0)
    for _ in range(500):
        scores = np.maximum(
            draw.integers(-5, draw.integers(1, 60), draw.integers(1, 400)), 0
        ).astype(np.float32)
        k = int(draw.integers(1, len(scores) + 1))
        expected = [i for i in np.argsort(-scores, kind="stable")[:k] if scores[i] > 0]
        assert _top_k(scores, k).tolist() == expected


# -- labels ---------------------------------------------------------------------------------------


def test_teacher_labels_are_the_scores_scaled_to_4(tmp_path: Path) -> None:
    teacher = FixedCrossEncoder()
    graded = mine(tmp_path, labels="teacher", cross_encoder=teacher, num_negatives=5)
    scores = mine(tmp_path, labels="scores", cross_encoder=teacher, num_negatives=5)
    assert graded.keys() == scores.keys()
    for query, docs in graded.items():
        raw = scores[query]
        low, high = min(raw.values()), max(raw.values())
        assert docs == pytest.approx(
            {doc: 4 * (raw[doc] - low) / (high - low) for doc in raw}, abs=1e-4
        )
        assert raw == pytest.approx({doc: teacher.table[query, doc] for doc in raw}, abs=1e-6)


def test_a_teacher_without_an_opinion_leaves_the_relevance(tmp_path: Path) -> None:
    class Flat(FixedCrossEncoder):
        def _score(self, query: str, document: str) -> float:
            return 0.25

    for query, docs in mine(tmp_path, labels="teacher", cross_encoder=Flat()).items():
        assert {doc for doc, label in docs.items() if label == 4} == {
            doc for q, doc in PAIRS if q == query
        }
        assert set(docs.values()) == {0, 4}


def test_a_cross_encoder_without_filters_orders_a_wider_range(tmp_path: Path) -> None:
    teacher, table = FixedCrossEncoder(), FixedEncoder(TEXTS).table
    corpus = list(dict.fromkeys([*DOCUMENTS, *(positive for _, positive in PAIRS)]))
    got = mine(tmp_path, num_negatives=3, cross_encoder=teacher)
    for query in QUERIES:
        nearest = sorted(corpus, key=lambda doc: -cos_sim(table[query], table[doc]).item())
        # range_max is 3 × 10 + 4, the most positives of a query; as many more are retrieved.
        candidates = [doc for doc in nearest[: 3 * 10 + 4 + 4] if (query, doc) not in PAIRS]
        best = sorted(candidates, key=lambda doc: -teacher.table[query, doc])[:3]
        assert {doc for doc, label in got[query].items() if label == 0} == set(best)


def test_labels_of_existing_lists_are_kept(tmp_path: Path) -> None:
    lists = [
        {"query": "berlin", "docs": ["berlin wall", "berlin city", "paris"], "labels": [2, 1, 0]},
        {"query": "wall", "docs": ["a wall", "berlin"], "labels": [0.5, 0]},
        {"query": "nothing", "docs": ["berlin zoo"], "labels": [0]},
    ]
    result = mine_hard_negatives(lists, output=tmp_path / "o.jsonl", show_progress_bar=False)
    assert by_query(tmp_path / "o.jsonl") == {
        "berlin": {"berlin wall": 2, "berlin city": 1, "berlin": 0, "berlin zoo": 0},
        "wall": {"a wall": 0.5, "berlin wall": 0},
    }
    assert result.queries_without_positive == 1


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"range_min": -1}, "range_min must be at least 0"),
        (
            {"num_negatives": 5, "range_min": 3, "range_max": 7},
            "range_max - range_min .*num_negatives=5",
        ),
        ({"max_score": float("nan")}, "max_score must be finite"),
        ({"sampling_strategy": "best"}, "sampling_strategy must be top or random, got 'best'"),
        ({"labels": "graded"}, "labels must be relevance, teacher or scores"),
        ({"labels": "teacher"}, "needs a cross_encoder"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"query_batch_size": 0}, "query_batch_size must be at least 1"),
        ({"cross_encoder": "a/path"}, "cross_encoder must have predict, got str"),
        ({"retriever": "bm26"}, "retriever must be 'bm25'"),
        ({"retriever": 3}, "expected an encoder or a callable, got int"),
        ({"output": "o.csv"}, "must be a .jsonl or .parquet file, got o.csv"),
        ({"output": "not/there/o.jsonl"}, "directory not/there does not exist"),
        ({"columns": {"title": "t"}}, "got the key 'title'"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    options = {"output": tmp_path / "o.jsonl", **options}
    with pytest.raises(ValueError, match=message):
        mine_hard_negatives([{"query": "berlin", "positive": "berlin wall"}], CORPUS, **options)
    assert not list(tmp_path.iterdir())


def test_nothing_found_says_what_skipped_it_and_can_be_tried_again(tmp_path: Path) -> None:
    rows = [{"query": "berlin", "positive": "berlin wall"}]
    options: dict[str, Any] = {"output": tmp_path / "o.jsonl", "show_progress_bar": False}
    with pytest.raises(ValueError, match=r"no candidate passed.*'max_score': 2"):
        mine_hard_negatives(rows, CORPUS, max_score=0.0001, **options)
    assert mine_hard_negatives(rows, CORPUS, **options).lists == 1


def test_skipped_candidates_are_counted_once(tmp_path: Path) -> None:
    # Scores 0: both margins would skip both candidates.
    rows = [{"query": "berlin", "positive": "paris"}]
    options: dict[str, Any] = {
        "absolute_margin": 5.0,
        "relative_margin": 0.1,
        "show_progress_bar": False,
    }
    with pytest.raises(ValueError, match=r"\{'absolute_margin': 2, 'relative_margin': 0\}"):
        mine_hard_negatives(rows, CORPUS, output=tmp_path / "o.jsonl", **options)


@pytest.mark.parametrize(
    ("scores", "message"), [(np.nan, "not finite for the pair"), ([1.0, 2.0], "not one for each")]
)
def test_a_cross_encoder_that_gives_no_scores(tmp_path: Path, scores: Any, message: str) -> None:
    class Broken:
        def predict(self, pairs: list[Any], **_: Any) -> Any:
            return np.array([scores] * len(pairs))

    with pytest.raises(ValueError, match=message):
        mine(tmp_path, cross_encoder=Broken())


def test_progress_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"query": "berlin", "positive": "berlin wall"}, {"query": "x", "positives": []}]
    with caplog.at_level(logging.WARNING):
        mine_hard_negatives(rows, CORPUS, output=tmp_path / "o.jsonl")
    assert "Mining: 100%" in capsys.readouterr().err
    assert caplog.messages == ["queries without a positive, left out: 1"]
    mine_hard_negatives(rows, CORPUS, output=tmp_path / "p.jsonl", show_progress_bar=False)
    assert capsys.readouterr().err == ""


def test_an_input_is_not_written_over(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    source.write_text('{"query": "query 0", "positives": ["document 0"]}\n')
    with pytest.raises(ValueError, match="is one of the inputs: expected another file"):
        mine_hard_negatives(
            source, DOCUMENTS, output=source, retriever=FixedEncoder(TEXTS), overwrite=True
        )
    assert source.read_text()
