"""Texts by their ids, as corpora and queries are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rerank_fast.data.rows import Source, name_of, read_rows
from rerank_fast.model.texts import check_text, plain, shown

QUERY_ID = ("query_id", "qid", "q_id")
DOC_ID = ("corpus_id", "doc_id", "docid", "document_id", "passage_id", "pid", "did")
_ID = ("_id", "id", *QUERY_ID, *DOC_ID)
_TEXT = ("text", "query", "question", "passage", "document", "contents", "body")
# Of tables without a header, by their columns: MS MARCO's queries, passages and documents.
_COLUMNS = {2: ("_id", "text"), 3: ("_id", "title", "text"), 4: ("_id", "url", "title", "text")}


def titled(title: Any, text: Any, where: str) -> str:
    """A text after its title, as BEIR and Tevatron join them."""
    text = check_text(text, f"{where}, text")
    title = "" if title is None else check_text(title, f"{where}, title")
    return f"{title} {text}".strip() if title else text


def normal(column: str) -> str:
    """A column's name in one spelling: query_id of query-id."""
    return column.strip().lower().replace("-", "_")


def column_of(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of these names that a column has, in whatever spelling."""
    spelled = {normal(column): column for column in columns}
    return next((spelled[name] for name in names if name in spelled), None)


def check_id(value: Any, place: str) -> str:
    """An id as a string.

    Raises:
        ValueError: it is neither a string nor an integer; begins with the place.
    """
    key = plain(value)
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise ValueError(f"{place}: expected a string or an integer as an id, got {shown(key)}")
    return str(key).strip()


def read_texts(source: Source) -> dict[str, str]:
    """All texts of a corpus or of queries by their ids, in memory; a title goes before its text.

    Args:
        source: rows with an id (_id, id, docid ...), a text (text, query, passage ...) and perhaps
            a title; or a .tsv file without a header: id, text or id, title, text.

    Raises:
        ValueError: the source can't be read, has no such columns, or an id stands for two texts.
    """
    texts: dict[str, str] = {}
    for place, row in read_rows(source, headerless=headerless):
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: expected an object with an id and a text, got {shown(row)}")
        columns = list(map(str, row))
        key_column, text_column = column_of(columns, _ID), column_of(columns, _TEXT)
        if key_column is None or text_column is None:
            missing = "an id" if key_column is None else "a text"
            raise ValueError(f"{place}: no column for {missing}; there are {sorted(columns)}")
        key = check_id(row[key_column], f"{place}, field {key_column}")
        text = titled(row.get("title"), row[text_column], place)
        if texts.setdefault(key, text) != text:
            raise ValueError(f"{place}: the id {key!r} stands for two texts")
    if not texts:
        raise ValueError(f"{name_of(source)} holds no text")
    return texts


def headerless(cells: Sequence[str]) -> Sequence[str] | None:
    """The columns of a .tsv file of texts by its first line, None where that is a header."""
    named = column_of(cells, _ID) is not None and column_of(cells, _TEXT) is not None
    return None if named else _COLUMNS.get(len(cells))
