"""Rows of JSON lines and Parquet; what is damaged is named by file and line, or row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

import pyarrow
import pyarrow.parquet

from rerank_fast.model.texts import one_line

LINE_SUFFIXES = (".jsonl", ".json", ".ndjson")

Path = str | PathLike[str]


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank and their numbers, from 1; without a byte order mark.

    Raises:
        ValueError: the file can't be read.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ValueError(f"file {path} can't be read: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line


def parse_line(path: Path, number: int, line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        ValueError: it is no UTF-8 text, or no JSON; names the file and the line.
    """
    try:
        return json.loads(line.decode().rstrip())  # or the parser counts one more line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from error


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


def python_rows(table: pyarrow.RecordBatch | pyarrow.Table, where: str, first: int = 0) -> Iterator[dict[str, Any]]:
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
                raise ValueError(f"{where}, row {row}, field {name}: not UTF-8 text: {error}") from error
        raise
