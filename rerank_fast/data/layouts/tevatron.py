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


def _passages(row: Row, name: str) -> Sequence[Any]:
    """A list of passages; `datasets` may have it as lists of their fields."""
    fields = row.values[name]
    if not isinstance(fields, Mapping):
        return row.listed(name)
    by_field = Row(row.place, {f"{name}.{key}": value for key, value in fields.items()})
    columns = [by_field.listed(key) for key in by_field.values]
    if len(set(map(len, columns))) > 1:
        raise ValueError(f"{row.where(name)}: lists of several lengths: {list(map(len, columns))}")
    return [dict(zip(fields, values, strict=True)) for values in zip(*columns, strict=True)]


def _texts(row: Row, name: str) -> list[str]:
    texts = []
    for i, passage in enumerate(_passages(row, name)):
        where = f"{row.where(name)}[{i}]"
        if not isinstance(passage, Mapping) or "text" not in passage:
            raise ValueError(f"{where}: expected a passage with a text, got {shown(passage)}")
        texts.append(titled(passage.get("title"), passage["text"], where))
    return texts
