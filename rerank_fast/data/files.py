"""Rows of JSON and Parquet; what is damaged is named by file and line, or row."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from rerank_fast.model.texts import one_line, shown

LINE_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}

Path = str | PathLike[str]


def suffix_of(path: Path) -> str:
    """What kind of file it is, compressed or not: .jsonl of lists.jsonl.gz."""
    name, suffix = os.path.splitext(os.fspath(path))
    return os.path.splitext(name)[1] if suffix in _COMPRESSED else suffix


def is_readable(path: Path) -> bool:
    """Whether a file's name says that it has rows."""
    if os.path.splitext(os.fspath(path))[1] == ".parquet":
        return True
    return suffix_of(path) in (*LINE_SUFFIXES, *TABLE_SUFFIXES)


def open_bytes(path: Path) -> BinaryIO:
    """A file's bytes; of a .gz or .zst file what was compressed.

    Raises:
        ValueError: the file can't be read, or pyarrow was built without its compression.
    """
    compression = _COMPRESSED.get(os.path.splitext(os.fspath(path))[1])
    try:
        if compression is None:
            return open(path, "rb")
        stream = pyarrow.input_stream(os.fspath(path), compression=compression)
        return io.BufferedReader(stream)
    except OSError as error:
        why = error.strerror or one_line(error)
        raise ValueError(f"file {path} can't be read: {why}") from error
    except pyarrow.ArrowException as error:
        raise ValueError(f"file {path} can't be read: {one_line(error)}") from error


def all_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file and their numbers, from 1; without a byte order mark.

    Raises:
        ValueError: the file can't be read, or what was compressed is damaged.
    """
    with open_bytes(path) as file:
        number, lines = 0, iter(file)
        while True:
            try:
                line = next(lines, None)
            except OSError as error:
                after = f"{path}, after line {number}"
                raise ValueError(f"{after}: damaged: {one_line(error)}") from error
            if line is None:
                return
            number += 1
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank and their numbers; see all_lines."""
    return ((number, line) for number, line in all_lines(path) if line.strip())


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of JSON lines, or of a .json file's array, each with its place.

    An array is in memory as a whole.

    Raises:
        ValueError: the file can't be read or is no JSON; names the file and the line.
    """
    for index, (number, line) in enumerate(numbered_lines(path)):
        if not index and suffix_of(path) == ".json" and line.lstrip().startswith(b"["):
            yield from ((f"{path}, row {row}", value) for row, value in enumerate(_array(path)))
            return
        place = f"{path}, line {number}"
        yield place, parse_line(place, line)


def _array(path: Path) -> list[Any]:
    content = b"".join(line for _, line in all_lines(path))
    try:
        values = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON array: {error}") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: expected a JSON array, got {shown(values)}")
    return values


def parse_line(place: str, line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        ValueError: it is no UTF-8 text, or no JSON; begins with the place.
    """
    try:
        return json.loads(line.decode().rstrip())  # or the parser counts one more line
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not a JSON object: {error}") from error


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """A Parquet file.

    Raises:
        ValueError: it is none, or its footer is damaged.
    """
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a Parquet file: {one_line(error)}") from error


def parquet_batches(
    file: pyarrow.parquet.ParquetFile, path: Path, group: int, first: int, **options: Any
) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """Batches of one row group's rows, each with the number of its first row.

    Args:
        first: number of the row group's first row.
        options: of `ParquetFile.iter_batches`.

    Raises:
        ValueError: a page is damaged, or rows are missing; names the file and the first such row.
    """
    end = first + file.metadata.row_group(group).num_rows
    batches: Iterator[pyarrow.RecordBatch] | None = None
    while True:
        try:
            batches = batches or iter(file.iter_batches(row_groups=[group], **options))
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, from row {first} on: damaged: {one_line(error)}") from error
        if batch is None:
            break
        yield first, batch
        first += batch.num_rows
    if first != end:
        raise ValueError(f"{path}, from row {first} on: damaged: the footer says {end} rows")


def table_batches(
    file: pyarrow.parquet.ParquetFile, path: Path, **options: Any
) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """Batches of all rows; see parquet_batches."""
    first = 0
    for group in range(file.num_row_groups):
        yield from parquet_batches(file, path, group, first, **options)
        first += file.metadata.row_group(group).num_rows


def python_rows(
    table: pyarrow.RecordBatch | pyarrow.Table, where: str, first: int = 0
) -> Iterator[dict[str, Any]]:
    """The rows as Python's values.

    Raises:
        ValueError: a text is not UTF-8; names the row and the field.
    """
    names = table.schema.names
    values = [python_values(table.column(i), name, where, first) for i, name in enumerate(names)]
    return (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))


def python_values(column: Iterable[Any], name: str, where: str, first: int = 0) -> list[Any]:
    """One column as Python's values; see python_rows."""
    try:
        return column.to_pylist()  # type: ignore[attr-defined]
    except UnicodeDecodeError:
        for row, value in enumerate(column, start=first):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}, row {row}, field {name}: not UTF-8 text: {error}"
                ) from error
        raise
