"""Corpora and queries from every kind of source; what is wrong with a row is said with its
place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from rerank_fast.data.mining.sources import load_collection

CORPUS = [
    {"_id": "x", "text": "first"},
    {"_id": 7, "text": "second"},
    {"_id": "z", "text": "first"},
]
QUERIES = [{"query": "q1", "positive_ids": ["z", 7]}, {"query": "q2", "positive_ids": "x"}]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(corpus: Any, queries: Any, **options: Any) -> dict[str, dict[str, float]]:
    found = load_collection(queries, corpus, **options)
    return {
        query: {found.corpus[i]: label for i, label in positives.items()}
        for query, positives in zip(found.queries, found.positives, strict=True)
    }


EXPECTED = {"q1": {"first": 1.0, "second": 1.0}, "q2": {"first": 1.0}}


@pytest.mark.parametrize("kind", ["rows", "jsonl", "parquet", "dataset", "mapping", "list"])
def test_kinds_of_corpus(tmp_path: Path, kind: str) -> None:
    rows = [{**row, "_id": str(row["_id"])} for row in CORPUS]
    queries = QUERIES
    if kind == "rows":
        corpus: Any = CORPUS
    elif kind == "jsonl":
        corpus = write(tmp_path / "c.jsonl", CORPUS)
    elif kind == "parquet":
        corpus = tmp_path / "c.parquet"
        pq.write_table(pa.Table.from_pylist(rows), corpus)
    elif kind == "dataset":
        corpus = Dataset.from_list(rows)
    elif kind == "mapping":
        corpus = {row["_id"]: row["text"] for row in rows}
    else:
        corpus = ["first", "second", "first"]
        queries = [{"query": "q1", "positive_ids": [2, 1]}, {"query": "q2", "positive_ids": 0}]
    assert texts(corpus, queries) == EXPECTED
    found = load_collection(queries, corpus)
    assert found.corpus == ["first", "second"]
    assert found.duplicates == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_kinds_of_queries(tmp_path: Path, kind: str) -> None:
    rows = [
        {"query": "q1", "positives": ["first", "second"]},
        {"query": "q2", "positives": ["first"]},
    ]
    queries: Any = Dataset.from_list(rows)
    if kind == "jsonl":
        queries = str(write(tmp_path / "q.jsonl", rows))
    elif kind == "parquet":
        queries = tmp_path / "q.parquet"
        pq.write_table(pa.Table.from_pylist(rows), queries)
    assert texts(None, queries) == EXPECTED
    assert texts(["another"], queries) == EXPECTED


def test_rows_of_one_query_are_merged_and_positives_join_the_corpus() -> None:
    rows = [{"anchor": "q1", "positive": "second"}, {"anchor": "q2", "positive": "first"}]
    rows += [{"anchor": "q1", "positive": "first"}, {"anchor": "q1", "positive": "second"}]
    assert texts(["other", "first"], rows) == {
        "q1": {"second": 1.0, "first": 1.0},
        "q2": {"first": 1.0},
    }
    assert load_collection(rows, ["other", "first"]).corpus == ["other", "first", "second"]


def test_lists_keep_their_grades_and_bring_all_documents() -> None:
    lists = [
        {"query": "q1", "docs": ["a", "b", "c"], "labels": [0, 3, 0.5]},
        {"query": "q1", "docs": ["c", "b"], "labels": [2, 1]},
        {"query": "q2", "docs": ["d"], "labels": [0]},
    ]
    assert texts(["e"], lists) == {"q1": {"b": 3.0, "c": 2.0}}
    found = load_collection(lists, ["e"])
    assert found.corpus == ["e", "a", "b", "c", "d"]
    assert found.without_positive == 1


def test_mapped_columns(tmp_path: Path) -> None:
    corpus = write(
        tmp_path / "c.jsonl",
        [{"pid": 1, "passage_text": "first"}, {"pid": 2, "passage_text": "second"}],
    )
    queries = write(tmp_path / "q.jsonl", [{"q": "q1", "rel": [1, 2]}, {"q": "q2", "rel": [1]}])
    columns = {"id": "pid", "text": "passage_text", "query": "q", "positive_ids": "rel"}
    assert texts(corpus, queries, columns=columns) == EXPECTED


@pytest.mark.parametrize("positives", [None, []])
def test_queries_without_a_positive_are_counted(positives: Any) -> None:
    rows = [{"query": "q1", "positives": positives}, {"query": "q2", "positives": ["first"]}]
    assert texts(None, rows) == {"q2": {"first": 1.0}}
    assert load_collection(rows).without_positive == 1
    with pytest.raises(ValueError, match="none of the 1 queries has a positive"):
        load_collection(rows[:1], ["first"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"query": "q", "positive_ids": ["x", "no", 8]},
            "field positive_ids: not in the corpus: 'no', 8$",
        ),
        (
            {"query": "q", "positive_ids": [1.5]},
            "field positive_ids: expected strings or integers, got 1.5",
        ),
        (
            {"query": "q", "positives": ["a", 3]},
            r"field positives\[1\]: expected a string, got int",
        ),
        ({"query": "q", "positives": [" "]}, r"field positives\[0\]: the string is empty"),
        ({"query": " ", "positives": ["a"]}, "field query: the string is empty"),
        ({"query": None, "positives": ["a"]}, "field query: expected a string"),
        ({"positives": ["a"]}, "no column query or anchor or question; there are"),
        (
            {"query": "q"},
            r"expected positives \(texts\), positive_ids, or docs and labels; "
            r"there are \['query'\]",
        ),
        (
            {"query": "q", "positives": ["a"], "docs": ["a"], "labels": [1]},
            "there are .*docs.*positives",
        ),
        (
            {"query": "q", "docs": ["a"], "labels": [1, 0]},
            "1 documents in docs but 2 labels in labels",
        ),
        ({"query": "q", "docs": ["a"]}, "no column labels"),
        ("a string", "expected an object with a query and its positives"),
    ],
)
def test_malformed_query_rows(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "q.jsonl", [{"query": "good", "positives": ["a"]}, row])
    with pytest.raises(ValueError, match=rf"q\.jsonl, line 2\b.*{message}"):
        load_collection(path, CORPUS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"_id": "y"}, "no column text or passage or document"),
        ({"_id": "y", "text": None}, "field text: expected a string"),
        ({"_id": 1.5, "text": "a"}, "expected a string or an integer as the id, got 1.5"),
        ({"_id": "x", "text": "other"}, "the id 'x' stands for two texts"),
        ({"_id": "y", "text": "\ud800"}, "not valid Unicode"),
        (["x", "text"], "expected an object with a text, got list"),
    ],
)
def test_malformed_corpus_rows(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "c.jsonl", [*CORPUS, row])
    with pytest.raises(ValueError, match=rf"c\.jsonl, line 4\b.*{message}"):
        load_collection(QUERIES, path)


def test_other_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corpus, document 1: expected a string, got int"):
        load_collection(QUERIES, ["first", 2])
    with pytest.raises(ValueError, match="corpus, id 'y': expected a string"):
        load_collection(QUERIES, {"x": "first", "y": None})
    with pytest.raises(ValueError, match="not in the corpus, which has no ids: 'z', 7"):
        load_collection(QUERIES, [{"text": "first"}])
    for empty in ([], {}, write(tmp_path / "c.jsonl", [])):
        with pytest.raises(ValueError, match=r"corpus: (list||.*c\.jsonl) holds no document"):
            load_collection(QUERIES, empty)
    with pytest.raises(ValueError, match="queries: list holds no query"):
        load_collection([], CORPUS)
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist"):
        load_collection(QUERIES, "missing.jsonl")
    with pytest.raises(ValueError, match="expected a path"):
        load_collection(QUERIES, 3)
