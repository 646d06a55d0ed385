"""sentence-transformers' rule: a label column by its name, the others by their order.

Two columns beside the labels are the query and its document, or its documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any

from rerank_fast.data.layouts.lists import label_columns
from rerank_fast.data.layouts.pairs import grouped
from rerank_fast.data.layouts.row import LABELS, Options, Row, ranked
from rerank_fast.model.texts import check_text, plain

NAME = "columns by order"
EXAMPLE = '{"sentence1": "...", "sentence2": "...", "label": 1}'


def matches(columns: Sequence[str]) -> bool:
    inputs = _inputs(columns)
    labelled = not set(columns).isdisjoint(LABELS)
    return labelled and len(inputs) == 2 and not any(map(_is_id, inputs))


def labels(columns: Sequence[str]) -> dict[str, str]:
    return label_columns(columns)


def rows(source: Iterable[Row], options: Options) -> Iterator[dict[str, Any]]:
    """Rows of the same columns that follow each other are read in the order of their first."""
    for _, group in groupby(source, key=lambda row: frozenset(_inputs(list(row.values)))):
        yield from _lists(group, options)


def _lists(source: Iterator[Row], options: Options) -> Iterator[dict[str, Any]]:
    first = next(source)
    query, docs = _inputs(list(first.values))
    source = chain([first], source)
    # A cell of a table may begin with a bracket: what its label is decides.
    listed = isinstance(plain(first.values[docs]), list | tuple)
    if listed or first.is_listed(first.labels_field(options)):
        return (_list(row, query, docs, options) for row in source)
    pairs = ((_query(row, query), row.text(docs), _label(row, options)) for row in source)
    return grouped(pairs, options)


def _inputs(columns: Sequence[str]) -> list[str]:
    return [name for name in columns if name not in (*LABELS, "dataset_name")]


def _is_id(name: str) -> bool:
    return name == "id" or name.endswith(("_id", "_ids", "_idx"))


def _query(row: Row, name: str) -> str:
    return check_text(row.values[name], row.where(name), allow_empty=False)


def _label(row: Row, options: Options) -> float:
    return row.number(row.labels_field(options))


def _list(row: Row, query: str, docs: str, options: Options) -> dict[str, Any]:
    name = row.labels_field(options)
    return ranked(row, _query(row, query), row.texts(docs), row.numbers(name), (docs, name))
