"""Rows of CSV and TSV, compressed or not; what is no row is named by its line."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from rerank_fast.data.files import Path, all_lines, suffix_of

# The columns' names where a file's first line is a row already, None where it names them itself.
Headerless = Callable[[Sequence[str]], Sequence[str] | None]


class Cell(str):
    """A cell of a table of text, where numbers and lists are written out."""

    __slots__ = ()


def delimited_rows(path: Path, headerless: Headerless) -> Iterator[tuple[str, dict[str, Cell]]]:
    """Rows with their place, read one after the other.

    A file whose first line names no columns has tabs and no quotes, as MS MARCO's have.

    Args:
        path: .csv or .tsv, or either with .gz or .zst.
        headerless: names the columns of a .tsv file by the cells of its first line.

    Raises:
        ValueError: the file can't be read, is no UTF-8 text, or a row has more or fewer cells than
            there are columns.
    """
    lines = _text_lines(path)
    first = next(lines, None)
    if first is None:
        return
    tabs = suffix_of(path) == ".tsv"
    names = headerless(first.rstrip("\r\n").split("\t")) if tabs else None
    # Python's own limit is 131,072 characters a cell, for the whole process.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(
        chain([first], lines),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_MINIMAL if names is None else csv.QUOTE_NONE,
        strict=True,
    )
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{place}: not a row of a table: {error}") from error
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if names is None:
            names = cells
            if len(set(names)) < len(names):
                raise ValueError(f"{place}: two columns have one name: {', '.join(names)}")
            continue
        if len(cells) != len(names):
            columns = f"{len(names)} columns ({', '.join(names)})"
            raise ValueError(f"{place}: {len(cells)} cells, but {columns}")
        yield place, dict(zip(names, map(Cell, cells), strict=True))


def _text_lines(path: Path) -> Iterator[str]:
    for number, line in all_lines(path):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 text: {error}") from error
