"""Blocks of (query, document) rows of JSONL and Parquet files that may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

_LINE_SUFFIXES = (".jsonl", ".json", ".ndjson")
_FIELDS = ("query", "document", "docs")


@dataclass(frozen=True)
class PairBlock:
    """Some rows of a file, which has its blocks in order, and what is kept of them beside the pairs."""

    index: int
    pairs: list[tuple[str, str]]
    sizes: list[int] | None  # documents of each row where a row is a list; None where it is a pair
    kept: pyarrow.Table


@dataclass(frozen=True)
class PairFile:
    """A file of pairs (query, document), or of lists (query, docs).

    Args:
        path: .jsonl or .parquet.
        columns: the file's own names: {"query": ..., "document": ... or "docs": ...}.
        keep: further columns that a block takes along.
        rows_per_block: rows of a block; the last one of a file or of a Parquet row group has fewer.

    Raises:
        ValueError: the file can't be read or a column is missing. While blocks are read: a malformed row, with the
            file and its line or row (the first one is line 1, row 0).
    """

    path: Path
    columns: Mapping[str, str]
    keep: Sequence[str]
    rows_per_block: int

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in _FIELDS:
                raise ValueError(
                    f"columns maps query and document or docs to the file's names, got the key {name!r}"
                )
        if self.path.suffix not in (*_LINE_SUFFIXES, ".parquet"):
            raise ValueError(f"expected a .jsonl or .parquet file of pairs, got {self.path}")
        if not self.path.is_file():
            raise ValueError(f"file {self.path} does not exist")

    def blocks(self, wanted: Callable[[int], bool]) -> Iterator[PairBlock]:
        """The wanted ones of the file's blocks; the others are not read where the file's kind allows it."""
        return (self._parquet if self.path.suffix == ".parquet" else self._lines)(wanted)

    def _names(self, there: Sequence[str], where: str) -> tuple[str, str, bool]:
        """The query's and the documents' columns, and whether a row is a list."""
        query, document, docs = (self.columns.get(field, field) for field in _FIELDS)
        is_list = "docs" in self.columns or ("document" not in self.columns and document not in there)
        for name in (query, docs if is_list else document, *self.keep):
            if name not in there:
                wanted = f"{document} (or {docs}, a list)" if name == docs and not self.columns else name
                raise ValueError(f"{where}: no column {wanted}; there are {', '.join(sorted(map(str, there)))}")
        return query, docs if is_list else document, is_list

    def _block(self, index: int, rows: list[tuple[str, Any]], names: tuple[str, str, bool], kept: Any) -> PairBlock:
        query_name, documents_name, is_list = names
        pairs, sizes = [], []
        for place, row in rows:
            query, documents = _text(row[query_name], f"{place}, column {query_name}"), row[documents_name]
            if not is_list:
                pairs.append((query, _text(documents, f"{place}, column {documents_name}")))
                continue
            if not isinstance(documents, list):
                raise ValueError(
                    f"{place}, column {documents_name}: expected a list of strings, got {_shown(documents)}"
                )
            sizes.append(len(documents))
            for n, document in enumerate(documents):
                pairs.append((query, _text(document, f"{place}, column {documents_name}[{n}]")))
        return PairBlock(index, pairs, sizes if is_list else None, kept)

    def _parquet(self, wanted: Callable[[int], bool]) -> Iterator[PairBlock]:
        try:
            file = pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path} is not a Parquet file: {error}") from error
        with file:
            names = self._names(file.schema_arrow.names, str(self.path))
            columns = list(dict.fromkeys([*names[:2], *self.keep]))
            index = row = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                indices = range(index, index + -(-size // self.rows_per_block))
                if any(wanted(n) for n in indices):
                    batches = file.iter_batches(self.rows_per_block, row_groups=[group], columns=columns)
                    starts = range(row, row + size, self.rows_per_block)
                    for n, start, batch in zip(indices, starts, batches, strict=True):
                        if wanted(n):
                            table = pyarrow.Table.from_batches([batch])
                            rows = [
                                (f"{self.path}, row {start + k}", values)
                                for k, values in enumerate(table.select(list(dict.fromkeys(names[:2]))).to_pylist())
                            ]
                            yield self._block(n, rows, names, table.select(list(self.keep)))
                index, row = indices.stop, row + size

    def _lines(self, wanted: Callable[[int], bool]) -> Iterator[PairBlock]:
        names: tuple[str, str, bool] | None = None
        index, lines = 0, list[tuple[int, bytes]]()

        def parsed() -> Iterator[tuple[str, Any]]:
            nonlocal names
            for number, line in lines:
                place = f"{self.path}, line {number}"
                try:
                    row = json.loads(line.rstrip())  # or the parser counts one more line
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{place}: not a JSON object: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{place}: expected a JSON object, got {_shown(row)}")
                if names is None or any(name not in row for name in (*names[:2], *self.keep)):
                    names = self._names(list(row), place)
                yield place, row

        def block() -> PairBlock:
            rows = list(parsed())
            assert names is not None
            kept = {name: _column([row[name] for _, row in rows]) for name in self.keep}
            return self._block(index, rows, names, pyarrow.table(kept))

        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                lines.append((number, line if wanted(index) else b""))
                if len(lines) == self.rows_per_block:
                    if wanted(index):
                        yield block()
                    index, lines = index + 1, []
        if lines and wanted(index):
            yield block()


def _column(values: list[Any]) -> pyarrow.Array:
    """A column of JSON values; of several kinds, or of numbers beyond 64 bits, as text."""
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
        return as_text(values)


def as_text(values: Iterable[Any]) -> pyarrow.Array:
    """JSON values as strings: strings as they are, others as JSON writes them."""
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pyarrow.array(texts, pyarrow.string())


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: expected a string, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{place}: not valid Unicode: {error}") from error
    return value


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"
