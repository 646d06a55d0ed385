"""Documents of queries with a grade or a score: qrels and runs, TREC's files or tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from rerank_fast.data.delimited import Cell
from rerank_fast.data.files import LINE_SUFFIXES, numbered_lines, suffix_of
from rerank_fast.data.layouts.row import number_of
from rerank_fast.data.layouts.texts import DOC_ID, QUERY_ID, check_id, column_of
from rerank_fast.data.rows import Placed, Source, paths_in, read_rows
from rerank_fast.model.texts import plain, shown

# {query id: {document id: grade or score}}, in their order; None where a run has ranks only.
Judged: TypeAlias = dict[str, dict[str, float | None]]

_QRELS = ("query_id", "iteration", "corpus_id", "score")
_RUN = ("query_id", "iteration", "corpus_id", "rank", "score", "tag")
_RANKS = ("query_id", "corpus_id", "rank")  # MS MARCO's runs
_DOCS = (*DOC_ID, *(f"{name}s" for name in DOC_ID))
_SCORE = ("score", "scores", "relevance", "rel", "label")


def read_judged(source: Source, *, default: float | None) -> Judged:
    """Qrels or a run, in memory.

    Args:
        source: TREC's four or six columns, MS MARCO's query, document and rank; or rows with
            query-id, corpus-id (or a list, corpus-ids) and score.
        default: of rows without a score.

    Raises:
        ValueError: the source can't be read or a row is malformed; names it and the field.
    """
    found: Judged = {}
    for place, row in _entries(source):
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: expected a query's id and a document's, got {shown(row)}")
        columns = list(map(str, row))
        query, doc = column_of(columns, ("_id", *QUERY_ID)), column_of(columns, _DOCS)
        if query is None or doc is None:
            missing = "query" if query is None else "document"
            there = sorted(columns)
            raise ValueError(f"{place}: no column for the {missing}'s id; there are {there}")
        docs, score = _listed(row[doc]), column_of(columns, _SCORE)
        values = [default] * len(docs)
        if score is not None:
            where = f"{place}, field {score}"
            values = [number_of(value, where) for value in _listed(row[score])]
            if len(values) != len(docs):
                raise ValueError(f"{where}: {len(values)} numbers for {len(docs)} documents")
        of_query = found.setdefault(check_id(row[query], f"{place}, field {query}"), {})
        for key, value in zip(docs, values, strict=True):
            of_query[check_id(key, f"{place}, field {doc}")] = value
    return found


def _listed(value: object) -> Sequence[object]:
    values = plain(value)
    return values if isinstance(values, list | tuple) else [values]


def _entries(source: Source) -> Iterator[Placed]:
    paths = paths_in(source)
    if paths is None:
        yield from read_rows(source)
        return
    for path in paths:
        names = _trec_names(path)
        if names is None:
            yield from read_rows(path, headerless=_headerless)
            continue
        for number, line in numbered_lines(path):
            place = f"{path}, line {number}"
            try:
                cells = line.decode().split()
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 text: {error}") from error
            if len(cells) != len(names):
                expected = " ".join(names)
                raise ValueError(f"{place}: expected {expected}, got {' '.join(cells)!r:.60}")
            yield place, dict(zip(names, map(Cell, cells), strict=True))


def _trec_names(path: str) -> Sequence[str] | None:
    """The columns of a file that blanks separate, by its first line; None of any other source."""
    if suffix_of(path) in (*LINE_SUFFIXES, ".csv", ".parquet") or not os.path.isfile(path):
        return None
    _, line = next(numbered_lines(path), (0, b""))
    return _headerless(line.decode(errors="replace").split())


def _headerless(cells: Sequence[str]) -> Sequence[str] | None:
    """Names by the number of cells, where they are no names themselves."""
    if column_of(cells, ("_id", *QUERY_ID)) is not None:
        return None
    return {len(names): names for names in (_RANKS, _QRELS, _RUN)}.get(len(cells))
