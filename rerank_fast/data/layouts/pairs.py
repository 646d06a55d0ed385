"""A row for each document; the rows of a query become its list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from rerank_fast.data.layouts.lists import label_columns
from rerank_fast.data.layouts.row import LABELS, QUERY, Options, Row

NAME = "pairs"
EXAMPLE = '{"query": "...", "document": "...", "label": 1}'

DOCUMENT = ("document", "passage", "response", "answer", "text")


def matches(columns: Sequence[str]) -> bool:
    there = set(columns)
    return all(not there.isdisjoint(names) for names in (QUERY, DOCUMENT, LABELS))


def labels(columns: Sequence[str]) -> dict[str, str]:
    return label_columns(columns)


def rows(source: Iterable[Row], options: Options) -> Iterator[dict[str, Any]]:
    def pairs() -> Iterator[tuple[str, str, float]]:
        for row in source:
            label = row.labels_field(options)
            yield row.query(), row.text(row.first(DOCUMENT)), row.number(label)

    return grouped(pairs(), options)


def grouped(
    pairs: Iterable[tuple[str, str, float]],  # query, document, label
    options: Options,
) -> Iterator[dict[str, Any]]:
    """A list for each query in the order of first pairs; of each run of pairs if consecutive."""
    if options.consecutive:
        for query, group in groupby(pairs, key=itemgetter(0)):
            _, docs, values = zip(*group, strict=True)
            yield {"query": query, "docs": list(docs), "labels": list(values)}
        return
    lists: dict[str, dict[str, Any]] = {}
    for query, doc, value in pairs:
        one = lists.setdefault(query, {"query": query, "docs": [], "labels": []})
        one["docs"].append(doc)
        one["labels"].append(value)
    yield from lists.values()
