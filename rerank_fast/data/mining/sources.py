"""Corpus and queries of a mining run, from files, datasets or memory, each row checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from datasets import DatasetDict

from rerank_fast.data.layouts import texts, triples
from rerank_fast.data.layouts.choice import FIELDS
from rerank_fast.data.layouts.judgements import judged_lists
from rerank_fast.data.layouts.lists import documents
from rerank_fast.data.layouts.parts import find_parts
from rerank_fast.data.layouts.row import Options, Row
from rerank_fast.data.layouts.sources import read_lists
from rerank_fast.data.rows import Placed, name_of, read_rows
from rerank_fast.model.texts import check_text, plain, shown

logger = logging.getLogger(__name__)

# The names that a column is found by where `columns` gives none.
_ALIASES = {
    "query": ("query", "anchor", "question"),
    "positives": ("positives", "positive"),
    "positive_ids": ("positive_ids", "positive_id"),
    "docs": ("docs",),
    "labels": ("labels", "label", "scores", "score"),
    "id": ("_id", "id", "doc_id", "docid"),
    "text": ("text", "passage", "document"),
}


@dataclass
class Collection:
    """Distinct documents, distinct queries, and which documents are relevant to which query."""

    corpus: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    # Per query: index in the corpus -> label.
    positives: list[dict[int, float]] = field(default_factory=list)
    duplicates: int = 0  # documents whose text was there already
    without_positive: int = 0  # queries left out


def load_collection(
    queries: Any, corpus: Any = None, *, columns: Mapping[str, str] | None = None
) -> Collection:
    """See `mine_hard_negatives` for what queries and corpus may be.

    Raises:
        ValueError: a source can't be read, or a row is malformed or names a document that is not in
            the corpus; says the file and line.
    """
    for name in columns or {}:
        if name not in _ALIASES:
            raise ValueError(
                f"columns maps {', '.join(_ALIASES)} to the source's names, got the key {name!r}"
            )
    names = {
        name: (columns[name],) if columns and name in columns else known
        for name, known in _ALIASES.items()
    }
    parts = find_parts(queries)
    if parts is not None and corpus is None and {"corpus", "queries", "qrels"} <= set(parts):
        corpus, queries = judged_lists(parts)
    collection = Collection()
    places: dict[str, int] = {}  # text -> index in the corpus
    ids: dict[str, int] = {}

    def add(text: str) -> int:
        index = places.setdefault(text, len(places))
        if index == len(collection.corpus):
            collection.corpus.append(text)
        return index

    for place, key, text in _documents(corpus, names):
        size = len(collection.corpus)
        index = add(text)
        collection.duplicates += len(collection.corpus) == size
        if key is not None and ids.setdefault(key, index) != index:
            raise ValueError(f"{place}: the id {key!r} stands for two texts")

    known: dict[str, int] = {}  # query -> index
    relevant: list[dict[int, float]] = []
    rows = 0
    for place, row in _queries(queries, names, columns):
        rows += 1
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{place}: expected an object with a query and its positives, got {shown(row)}"
            )
        column = _column(row, names["query"], place)
        query = check_text(row[column], f"{place}, field {column}", allow_empty=False)
        found = relevant[known[query]] if query in known else {}
        for index, label in _positives(row, place, names, ids, add):
            found[index] = max(label, found.get(index, label))
        if query not in known:
            known[query] = len(relevant)
            relevant.append(found)
    if not rows:
        raise ValueError(f"queries: {name_of(queries)} holds no query")
    for query, i in known.items():
        if relevant[i]:
            collection.queries.append(query)
            collection.positives.append(relevant[i])
    collection.without_positive = len(known) - len(collection.queries)
    if not collection.queries:
        raise ValueError(f"none of the {len(known)} queries has a positive")
    return collection


def _queries(
    queries: Any, names: Mapping[str, Sequence[str]], columns: Mapping[str, str] | None
) -> Iterator[Placed]:
    """Rows with positives, their ids or documents as they are; others as lists by their layout."""
    if find_parts(queries) is None:
        rows = read_rows(queries, headerless=triples.headerless)
        first = next(rows, None)
        if first is None:
            return
        rows, row = chain([first], rows), first[1]
        kinds = (names[kind] for kind in ("positives", "positive_ids", "docs"))
        known = isinstance(row, Mapping) and any(name in row for kind in kinds for name in kind)
        if not isinstance(row, Mapping) or (
            known and not any("negative" in str(name) for name in row)
        ):
            yield from rows
            return
    named = {field: name for field, name in (columns or {}).items() if field in FIELDS}
    for number, one in enumerate(read_lists(queries, Options(), columns=named, say=logger.info)):
        yield f"list {number}", {names[field][0]: value for field, value in one.items()}


def _column(row: Mapping[str, Any], candidates: Sequence[str], place: str) -> str:
    found = next((name for name in candidates if name in row), None)
    if found is None:
        raise ValueError(
            f"{place}: no column {' or '.join(candidates)}; there are {sorted(map(str, row))}"
        )
    return found


def _documents(
    corpus: Any, names: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str | None, str]]:
    """(place, id, text) of each document of the corpus; a list's ids are its positions."""
    if corpus is None:
        return
    corpus = plain(corpus) if isinstance(corpus, np.ndarray) else corpus
    if isinstance(corpus, Mapping) and not isinstance(corpus, DatasetDict):
        if not corpus:
            raise ValueError(f"corpus: {name_of(corpus)} holds no document")
        for key, text in corpus.items():
            yield f"corpus, id {key!r}", str(plain(key)), check_text(text, f"corpus, id {key!r}")
        return
    if (
        isinstance(corpus, Sequence)
        and not isinstance(corpus, str)
        and corpus
        and isinstance(corpus[0], str)
    ):
        for i, text in enumerate(corpus):
            yield f"corpus, document {i}", str(i), check_text(text, f"corpus, document {i}")
        return
    rows = 0
    for place, row in read_rows(corpus, headerless=texts.headerless):
        rows += 1
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: expected an object with a text, got {shown(row)}")
        column = _column(row, names["text"], place)
        key = plain(next((row[name] for name in names["id"] if name in row), None))
        if key is not None and (isinstance(key, bool) or not isinstance(key, str | int)):
            raise ValueError(f"{place}: expected a string or an integer as the id, got {key!r:.40}")
        yield (
            place,
            None if key is None else str(key),
            check_text(row[column], f"{place}, field {column}"),
        )
    if not rows:
        raise ValueError(f"corpus: {name_of(corpus)} holds no document")


def _positives(
    row: Mapping[str, Any],
    place: str,
    names: Mapping[str, Sequence[str]],
    ids: Mapping[str, int],
    add: Any,
) -> Iterator[tuple[int, float]]:
    """(index in the corpus, label) of a row's positives; its texts join the corpus."""
    kinds = [
        kind
        for kind in ("positives", "positive_ids", "docs")
        if any(name in row for name in names[kind])
    ]
    if len(kinds) != 1:
        raise ValueError(
            f"{place}: expected positives (texts), positive_ids, or docs and labels; "
            f"there are {sorted(map(str, row))}"
        )
    kind = kinds[0]
    column = _column(row, names[kind], place)
    if kind == "docs":
        labels = _column(row, names["labels"], place)
        docs, values = documents(Row(place, row), column, labels)
        for text, label in zip(docs, values, strict=True):
            index = add(text)
            if label > 0:
                yield index, label
        return
    values = plain(row[column])
    if values is None:
        return
    values = [plain(value) for value in (values if isinstance(values, list | tuple) else [values])]
    if kind == "positives":
        for i, value in enumerate(values):
            yield add(check_text(value, f"{place}, field {column}[{i}]", allow_empty=False)), 1.0
        return
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(
                f"{place}, field {column}: expected strings or integers, got {value!r:.40}"
            )
    missing = [value for value in values if str(value) not in ids]
    if missing:
        why = "" if ids else ", which has no ids"
        raise ValueError(
            f"{place}, field {column}: not in the corpus{why}: {', '.join(map(repr, missing[:10]))}"
        )
    for value in values:
        yield ids[str(value)], 1.0
