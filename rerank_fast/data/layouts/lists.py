"""Ranking lists as they are: a query, its documents, a label for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rerank_fast.data.layouts.row import LABELS, QUERY, SCORES, Options, Row, check_sizes

NAME = "lists"
EXAMPLE = '{"query": "...", "docs": ["...", "..."], "labels": [1, 0]}'


def matches(columns: Sequence[str]) -> bool:
    there = set(columns)
    return not there.isdisjoint(QUERY) and "docs" in there and not there.isdisjoint(LABELS)


def labels(columns: Sequence[str]) -> dict[str, str]:
    return label_columns(columns)


def rows(source: Iterable[Row], options: Options) -> Iterator[dict[str, Any]]:
    for row in source:
        query = row.query()
        docs, values = documents(row, "docs", row.labels_field(options))
        yield {"query": query, "docs": docs, "labels": values}


def documents(row: Row, docs: str, labels: str) -> tuple[list[str], list[float]]:
    """The documents and the labels in these fields.

    Raises:
        ValueError: a document is no text, a label no finite number, or there is not one for each.
    """
    texts, values = row.texts(docs), row.numbers(labels)
    check_sizes(row, texts, values, (docs, labels))
    return texts, values


def label_columns(columns: Sequence[str]) -> dict[str, str]:
    """The column of each choice; scores are also the labels where there are no others."""
    found = {"relevance": next(name for name in LABELS if name in columns)}
    scores = next((name for name in SCORES if name in columns), None)
    return found if scores is None else found | {"scores": scores}
