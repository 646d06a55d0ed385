"""Tevatron's rows: positives and negatives as passages with a title, which goes before the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rerank_fast.data.layouts.row import QUERY, Options, Row, ranked, relevance
from rerank_fast.data.layouts.texts import titled
from rerank_fast.model.texts import shown

NAME = "Tevatron"
EXAMPLE = (
    '{"query": "...", "positive_passages": [{"docid": "7", "title": "...", "text": "..."}], '
    '"negative_passages": [{"docid": "8", "title": "...", "text": "..."}]}'
)


def matches(columns: Sequence[str]) -> bool:
    there = set(columns)
    return {"positive_passages", "negative_passages"} <= there and not there.isdisjoint(QUERY)


def labels(columns: Sequence[str]) -> dict[str, str]:
    return {"relevance": "1 for positive_passages, 0 for negative_passages"}


def rows(source: Iterable[Row], options: Options) -> Iterator[dict[str, Any]]:
    for row in source:
        query = row.query()
        positive = _texts(row, "positive_passages")
        docs = positive + _texts(row, "negative_passages")
        values = relevance(len(positive), len(docs))
        yield ranked(row, query, docs, values, ("positive_passages", "positive_passages"))


def _texts(row: Row, name: str) -> list[str]:
    texts = []
    for i, passage in enumerate(row.listed(name)):
        where = f"{row.where(name)}[{i}]"
        if not isinstance(passage, Mapping) or "text" not in passage:
            raise ValueError(f"{where}: expected a passage with a text, got {shown(passage)}")
        texts.append(titled(passage.get("title"), passage["text"], where))
    return texts
