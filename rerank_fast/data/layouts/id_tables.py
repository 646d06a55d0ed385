"""Rows that name queries and documents by ids, and the tables that hold the texts.

A row is read with its ids' texts in their place, as one of the layouts of rows: triples of ids, ids
with a teacher's scores, and MS MARCO's hard negatives (qid, pos, and neg by the system that found
them) with the scores of a cross-encoder. Tables are in memory; rows are read one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rerank_fast.data.layouts.row import Row
from rerank_fast.data.layouts.texts import DOC_ID, QUERY_ID, check_id, column_of, normal, read_texts
from rerank_fast.data.layouts.triples import headerless
from rerank_fast.data.rows import Placed, Source, read_items
from rerank_fast.model.texts import plain, shown

NAME = "id tables"
EXAMPLE = '{"lists": "qidpidtriples.tsv", "queries": "queries.tsv", "corpus": "collection.tsv"}'

_DOCUMENT = r"(?:(?:document|doc|passage|corpus)_?)?"
_PAIRED = re.compile(rf"(positive|negative|pos|neg)_{_DOCUMENT}p?ids?(?:_(\d+))?")
_FOUND = ("pos", "neg")  # in MS MARCO's hard negatives, beside qid


def matches(parts: Sequence[str]) -> bool:
    return "lists" in parts


def resolved(parts: Mapping[str, Source]) -> Iterator[tuple[str, Iterator[Placed]]]:
    """The files of lists and their rows, with texts in place of ids."""
    queries = read_texts(parts["queries"]) if "queries" in parts else {}
    corpus = read_texts(parts["corpus"]) if "corpus" in parts else {}

    def with_texts(rows: Iterator[Placed]) -> Iterator[Placed]:
        for place, row in rows:
            yield place, _texts(row, place, queries, corpus) if isinstance(row, Mapping) else row

    for name, rows in read_items(parts["lists"], headerless=headerless):
        yield name, with_texts(rows)


def _texts(
    row: Mapping[str, Any], place: str, queries: Mapping[str, str], corpus: Mapping[str, str]
) -> dict[str, Any]:
    """A row with texts in place of ids, under the names that the layouts of rows have for them."""
    hard = set(_FOUND) <= set(row) and column_of(list(row), QUERY_ID) is not None
    resolved: dict[str, Any] = {}
    for column, value in row.items():
        where, name = f"{place}, field {column}", normal(str(column))
        if name in QUERY_ID:
            resolved["query"] = _text(value, queries, "queries", where)
        elif paired := _PAIRED.fullmatch(name):
            kind = {"pos": "positive", "neg": "negative"}.get(paired[1], paired[1])
            resolved[f"{kind}_{paired[2]}" if paired[2] else kind] = _all(value, corpus, where)
        elif name in DOC_ID or name.removesuffix("s") in DOC_ID:
            found = _all(value, corpus, where)
            resolved["docs" if isinstance(found, list) else "document"] = found
        elif hard and name in _FOUND:
            resolved |= _hard(name, value, corpus, where)
        else:
            resolved[column] = value
    return resolved


def _text(value: Any, texts: Mapping[str, str], part: str, where: str) -> str:
    key = check_id(value, where)
    if key not in texts:
        there = f"{part} has no {key!r}" if texts else f"there is no part {part} to find {key!r} in"
        raise ValueError(f"{where}: {there}")
    return texts[key]


def _all(value: Any, corpus: Mapping[str, str], where: str) -> str | list[str]:
    """The text of an id, or the texts of a list of ids."""
    row = Row(where, {"": value})
    if not row.is_listed(""):
        return _text(value, corpus, "corpus", where)
    return [_text(one, corpus, "corpus", f"{where}[{i}]") for i, one in enumerate(row.listed(""))]


def _hard(name: str, value: Any, corpus: Mapping[str, str], where: str) -> dict[str, Any]:
    """Texts of one side of a row of hard negatives, and scores where each id comes with one."""
    found = plain(value)
    if isinstance(found, Mapping):
        placed = [(f"{where}.{system}", ids) for system, ids in found.items()]
    else:
        placed = [(where, found)]
    texts: dict[str, Any] = {}  # by id: systems find the same ones
    for place, ids in placed:
        if ids is None:  # in a table every row has all systems
            continue
        if not isinstance(ids, list | tuple):
            raise ValueError(f"{place}: expected a list of ids, got {shown(ids)}")
        for i, entry in enumerate(ids):
            key, score = _entry(entry, f"{place}[{i}]")
            texts.setdefault(key, (_text(key, corpus, "corpus", f"{place}[{i}]"), score))
    scores = [score for _, score in texts.values() if score is not None]
    resolved: dict[str, Any] = {name: [text for text, _ in texts.values()]}
    return resolved | ({f"{name}_scores": scores} if len(scores) == len(texts) else {})


def _entry(entry: Any, place: str) -> tuple[str, Any]:
    """An id, or {"pid": id, "ce-score": score}."""
    if not isinstance(entry, Mapping):
        return check_id(entry, place), None
    columns = list(map(str, entry))
    key, score = column_of(columns, ("id", *DOC_ID)), column_of(columns, ("ce_score", "score"))
    if key is None:
        raise ValueError(f"{place}: no column for the document's id; there are {sorted(columns)}")
    return check_id(entry[key], f"{place}.{key}"), None if score is None else entry[score]
