"""Blocks of (query, document) rows of JSONL and Parquet files that may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow

from rerank_fast.data.delimited import delimited_rows
from rerank_fast.data.files import (
    TABLE_SUFFIXES,
    is_readable,
    json_values,
    numbered_lines,
    open_parquet,
    parquet_batches,
    parse_line,
    python_rows,
    suffix_of,
)
from rerank_fast.data.layouts.pairs import DOCUMENT
from rerank_fast.data.layouts.row import QUERY, Row
from rerank_fast.model.texts import check_text, one_line, shown

_FIELDS = ("query", "document", "docs")


@dataclass(frozen=True)
class PairBlock:
    """Some rows of a file, which has its blocks in order, and what is kept of them beside the
    pairs.
    """

    index: int
    pairs: list[tuple[str, str]]
    sizes: list[int] | None  # documents of each row where a row is a list; None where it is a pair
    kept: pyarrow.Table


@dataclass(frozen=True)
class _Names:
    """The columns that are read, as the first row has them: a file is of pairs or of lists."""

    query: str
    documents: str
    is_list: bool


@dataclass(frozen=True)
class PairFile:
    """A file of pairs (query, document), or of lists (query, docs).

    Args:
        path: .jsonl, .json, .csv, .tsv (each also .gz or .zst) or .parquet.
        columns: the file's own names: {"query": ..., "document": ... or "docs": ...}. A query is
            also found as anchor or question, a document as passage, response, answer or text.
        keep: further columns that a block takes along.
        rows_per_block: rows of a block; the last one of a file or of a Parquet row group has fewer.

    Raises:
        ValueError: the file can't be read or a column is missing. While blocks are read: a
            malformed row, with the file and its line or row (the first is line 1, row 0) and field.
    """

    path: Path
    columns: Mapping[str, str]
    keep: Sequence[str]
    rows_per_block: int

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in _FIELDS:
                raise ValueError(
                    "columns maps query and document or docs to the file's names, got the key "
                    f"{name!r}"
                )
        for name in self.keep:
            check_text(name, "keep")
        if not is_readable(self.path):
            kinds = ".jsonl, .json, .csv, .tsv (each also .gz or .zst) or .parquet"
            raise ValueError(f"expected a {kinds} file of pairs, got {self.path}")
        if not self.path.is_file():
            raise ValueError(f"file {self.path} does not exist")

    def blocks(self, wanted: Callable[[int], bool]) -> Iterator[PairBlock]:
        """The wanted ones of the file's blocks; the others are not read where the file's kind
        allows it.
        """
        return (self._parquet if self.path.suffix == ".parquet" else self._lines)(wanted)

    def _names(self, there: Sequence[str], where: str) -> _Names:
        query = self.columns.get("query") or next(
            (name for name in QUERY if name in there), "query"
        )
        document = self.columns.get("document")
        document = document or next((name for name in DOCUMENT if name in there), "document")
        docs = self.columns.get("docs", "docs")
        is_list = "docs" in self.columns or (
            "document" not in self.columns and document not in there
        )
        names = _Names(query, docs if is_list else document, is_list)
        for name in (names.query, names.documents, *self.keep):
            if name not in there:
                wanted = (
                    f"{document} (or {docs}, a list)" if name == docs and not self.columns else name
                )
                raise ValueError(
                    f"{where}: no column {wanted}; there are {', '.join(sorted(map(str, there)))}"
                )
        return names

    def _block(
        self, index: int, rows: list[tuple[str, Any]], names: _Names, kept: pyarrow.Table
    ) -> PairBlock:
        pairs: list[tuple[str, str]] = []
        sizes = []
        for place, row in rows:
            read = Row(place, row)
            query = read.text(names.query)
            if not names.is_list:
                pairs.append((query, read.text(names.documents)))
                continue
            documents = read.texts(names.documents)
            sizes.append(len(documents))
            pairs += [(query, document) for document in documents]
        return PairBlock(index, pairs, sizes if names.is_list else None, kept)

    def _parquet(self, wanted: Callable[[int], bool]) -> Iterator[PairBlock]:
        with open_parquet(self.path) as file:
            names = self._names(file.schema_arrow.names, str(self.path))
            read = list(dict.fromkeys([names.query, names.documents]))
            columns = list(dict.fromkeys([*read, *self.keep]))
            index = row = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                indices = range(index, index + -(-size // self.rows_per_block))
                if any(wanted(n) for n in indices):
                    batches = parquet_batches(
                        file, self.path, group, row, batch_size=self.rows_per_block, columns=columns
                    )
                    for n, (start, batch) in enumerate(batches, start=index):
                        if wanted(n):
                            yield self._parquet_block(n, start, batch, names, read)
                index, row = indices.stop, row + size

    def _parquet_block(
        self, index: int, start: int, batch: pyarrow.RecordBatch, names: _Names, read: list[str]
    ) -> PairBlock:
        table = pyarrow.Table.from_batches([batch])
        rows = python_rows(table.select(read), str(self.path), start)
        placed = [(f"{self.path}, row {start + k}", values) for k, values in enumerate(rows)]
        kept = table.select(list(self.keep))
        try:
            kept.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            list(python_rows(kept, str(self.path), start))  # names the row and the field of a text
            raise ValueError(
                f"{self.path}, from row {start} on: damaged: {one_line(error)}"
            ) from error
        return self._block(index, placed, names, kept)

    def _lines(self, wanted: Callable[[int], bool]) -> Iterator[PairBlock]:
        names: _Names | None = None
        index, lines = 0, list[tuple[str, Any]]()

        def block() -> PairBlock:
            assert names is not None
            rows = [(place, self._row(place, value, names)) for place, value in lines]
            kept = {name: _column([row[name] for _, row in rows], rows, name) for name in self.keep}
            return self._block(index, rows, names, pyarrow.table(kept))

        for place, value in self._values():
            if names is None:
                names = self._names(list(self._object(place, value)), place)
            lines.append((place, value if wanted(index) else None))
            if len(lines) == self.rows_per_block:
                if wanted(index):
                    yield block()
                index, lines = index + 1, []
        if lines and wanted(index):
            yield block()

    def _values(self) -> Iterator[tuple[str, Any]]:
        """Rows and their places; JSON lines not parsed yet, which of other processes' blocks is not
        done.
        """
        suffix = suffix_of(self.path)
        if suffix in TABLE_SUFFIXES:
            return delimited_rows(self.path, _headerless)
        if suffix == ".json":
            return json_values(self.path)
        return ((f"{self.path}, line {number}", line) for number, line in numbered_lines(self.path))

    def _object(self, place: str, value: Any) -> dict[str, Any]:
        row = parse_line(place, value) if isinstance(value, bytes) else value
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, got {shown(row)}")
        return row

    def _row(self, place: str, value: Any, names: _Names) -> dict[str, Any]:
        row = self._object(place, value)
        for name in (names.query, names.documents, *self.keep):
            if name not in row:
                kind = "a list" if names.is_list else "a pair"
                raise ValueError(
                    f"{place}: no column {name}, which the file's first row has, {kind}; there are "
                    f"{', '.join(sorted(row))}"
                )
        return row


def _headerless(cells: Sequence[str]) -> Sequence[str] | None:
    """Names of a .tsv file's columns where its first line has none: MS MARCO's top 1000, or
    pairs.
    """
    if len(cells) == 4 and all(cell.strip().isdigit() for cell in cells[:2]):
        return ("query_id", "document_id", "query", "document")
    pair = len(cells) == 2 and any(" " in cell.strip() for cell in cells)
    return ("query", "document") if pair else None


def _column(values: list[Any], rows: list[tuple[str, Any]], name: str) -> pyarrow.Array:
    """A column of JSON values; of several kinds, or of numbers beyond 64 bits, as text."""
    try:
        try:
            return pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
            return as_text(values)
    except UnicodeEncodeError:
        for value, (place, _) in zip(values, rows, strict=True):
            try:
                pyarrow.array([value])
            except UnicodeEncodeError as error:
                raise ValueError(f"{place}, field {name}: not valid Unicode: {error}") from error
        raise


def as_text(values: Iterable[Any]) -> pyarrow.Array:
    """JSON values as strings: strings as they are, others as JSON writes them."""
    texts = [
        value if value is None or isinstance(value, str) else json.dumps(value) for value in values
    ]
    return pyarrow.array(texts, pyarrow.string())
