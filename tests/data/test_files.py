"""Damaged JSON lines and Parquet, by every reader: the file, the line or row, and the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rerank_fast.data import ListStream, load_lists
from rerank_fast.data.hub import read_columns
from rerank_fast.data.mining.sources import load_collection
from rerank_fast.data.pairs import PairFile

ROWS = [
    {"query": f"query {n}", "docs": [f"a {n}", f"b {n}"], "labels": [1.0, 0.0]} for n in range(3000)
]


def read_pairs(path: Path) -> Any:
    return [block.pairs for block in PairFile(path, {}, ["labels"], 100).blocks(lambda index: True)]


READERS: dict[str, Callable[[Path], Any]] = {
    "load_lists": lambda path: load_lists(path).to_list(),
    "ListStream": lambda path: list(ListStream(path)),
    "load_collection": load_collection,
    "PairFile": read_pairs,
}
COLUMNS = ("query", "docs", "labels")
TABLES = {**READERS, "read_columns": lambda path: read_columns([path], COLUMNS, str(path))}


def write_lines(path: Path) -> list[bytes]:
    lines = [json.dumps(row).encode() for row in ROWS]
    path.write_bytes(b"\n".join(lines))
    return lines


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "\xe9", "docs": ["a"], "labels": [1]}', "not UTF-8 text: .*0xe9"),
        (b"\xff\xfe{", "not UTF-8 text"),
        (b'{"query": "a', "not a JSON object"),
        (b"\x00\x00", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"query": ' + b"1" * 5000 + b"}", "not a JSON object"),
        (b"[1]", "expected .*object.*, got list"),
        (b'{"query": "\\udc00", "docs": ["a"], "labels": [1]}', "field query: not valid Unicode"),
        (
            b'{"query": "a", "docs": ["a", "\\ud800"], "labels": [1, 0]}',
            r"field docs\[1\]: not valid Unicode",
        ),
        (b'{"query": "a", "docs": "a", "labels": [1]}', "field docs: expected a list"),
    ],
    ids=repr,
)
def test_a_damaged_line_is_named(tmp_path: Path, reader: str, line: bytes, message: str):
    path = tmp_path / "lists.jsonl"
    lines = write_lines(path)
    lines[1999] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=rf"lists\.jsonl, line 2000\b.*{message}"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
def test_line_ends_and_a_byte_order_mark(tmp_path: Path, reader: str):
    path = tmp_path / "lists.jsonl"
    lines = write_lines(path)
    expected = READERS[reader](path)
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines) + b"\n")
    if reader == "load_collection":
        assert (READERS[reader](path).queries, READERS[reader](path).corpus) == (
            expected.queries,
            expected.corpus,
        )
    else:
        assert READERS[reader](path) == expected


def write_table(path: Path, **options: Any) -> Path:
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), path, row_group_size=1000, **options
    )
    return path


def with_bad_text(column: pyarrow.Array, row: int) -> pyarrow.Array:
    """The strings with one that is Latin-1."""
    texts = [text.encode() for text in column.to_pylist()]
    texts[row] = "é".encode("latin-1")
    return pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())


@pytest.mark.parametrize("reader", TABLES)
@pytest.mark.parametrize("field", ["query", "docs"])
def test_a_text_of_a_table_that_is_not_utf8_is_named(tmp_path: Path, reader: str, field: str):
    table = pyarrow.Table.from_pylist(ROWS)
    column = table.column(field).combine_chunks()
    if field == "query":
        column = with_bad_text(column, 2345)
    else:
        column = pyarrow.ListArray.from_arrays(
            column.offsets, with_bad_text(column.values, 2 * 2345 + 1)
        )
    path = tmp_path / "lists.parquet"
    pyarrow.parquet.write_table(
        table.set_column(COLUMNS.index(field), field, column), path, row_group_size=1000
    )
    with pytest.raises(
        ValueError, match=rf"lists\.parquet, row 2345, field {field}: not UTF-8 text"
    ):
        TABLES[reader](path)


def test_a_kept_text_that_is_not_utf8_is_named(tmp_path: Path):
    column = with_bad_text(pyarrow.array([row["query"] for row in ROWS]), 2345)
    table = pyarrow.Table.from_pylist(ROWS).append_column("id", column)
    path = tmp_path / "lists.parquet"
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"lists\.parquet, row 2345, field id: not UTF-8 text"):
        list(PairFile(path, {}, ["id"], 100).blocks(lambda index: True))


@pytest.mark.parametrize("reader", TABLES)
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_damaged_page_is_named(tmp_path: Path, reader: str, compression: str):
    path = write_table(tmp_path / "lists.parquet", compression=compression, use_dictionary=False)
    content = bytearray(path.read_bytes())
    start = pyarrow.parquet.read_metadata(path).row_group(1).column(0).data_page_offset
    content[start : start + 30] = b"\xff" * 30  # the page's header
    path.write_bytes(content)
    where = "" if reader == "read_columns" else r", from row 1000 on: damaged"
    with pytest.raises(ValueError, match=rf"lists\.parquet{where}"):
        TABLES[reader](path)


@pytest.mark.parametrize("reader", TABLES)
@pytest.mark.parametrize("keep", [0, 3, 1000, -1, -100])
def test_a_truncated_table_is_named(tmp_path: Path, reader: str, keep: int):
    path = write_table(tmp_path / "lists.parquet")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"lists\.parquet"):
        TABLES[reader](path)


def test_a_saved_datasets_damaged_text_is_named(tmp_path: Path):
    column = with_bad_text(pyarrow.array([row["query"] for row in ROWS]), 2345)
    table = pyarrow.Table.from_pylist(ROWS).set_column(0, "query", column)
    dataset = datasets.Dataset(table)
    dataset.save_to_disk(tmp_path / "saved")
    for source in (dataset, tmp_path / "saved"):
        where = "saved" if isinstance(source, Path) else "dataset"
        with pytest.raises(ValueError, match=rf"{where}, from row 2048 on: damaged"):
            load_lists(source)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"3", b"{", b"\xff" * 100])
def test_a_damaged_saved_dataset_is_named(tmp_path: Path, name: str, content: bytes):
    datasets.Dataset.from_list(ROWS[:10]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_bytes(content)
    if (name, content) == ("dataset_info.json", b"{}"):
        assert len(load_lists(tmp_path / "saved")) == 10  # which is all that it says
    else:
        with pytest.raises(ValueError, match="saved"):
            load_lists(tmp_path / "saved")
