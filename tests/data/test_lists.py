"""Reading lists: every source gives one schema, every malformed row says where it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rerank_fast.data import load_lists

ROWS: list[dict[str, Any]] = [
    {"query": "first", "docs": ["a", "b", "a"], "labels": [1, 0, 0]},
    {"query": "zweite Fräge \U0001f43c", "docs": ["", "c"], "labels": [0.5, 2]},
    {"query": "third", "docs": ["d"], "labels": [True]},
]
EXPECTED = [
    {"query": "first", "docs": ["a", "b", "a"], "labels": [1.0, 0.0, 0.0]},
    {"query": "zweite Fräge \U0001f43c", "docs": ["", "c"], "labels": [0.5, 2.0]},
    {"query": "third", "docs": ["d"], "labels": [1.0]},
]
GOOD = {"query": "q", "docs": ["a", "b"], "labels": [1, 0]}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numeric(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arrow columns have one type: the labels as floats."""
    return [{**row, "labels": [float(label) for label in row["labels"]]} for row in rows]


def check(lists: datasets.Dataset, expected: list[dict[str, Any]]) -> None:
    assert lists.to_list() == expected
    assert lists.column_names == ["query", "docs", "labels"]
    schema = lists.features.arrow_schema
    assert schema.field("query").type == pa.string()
    assert schema.field("docs").type == pa.list_(pa.string())
    assert schema.field("labels").type == pa.list_(pa.float32())


# -- sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_type", [str, Path])
def test_json_lines(tmp_path: Path, as_type: type) -> None:
    check(load_lists(as_type(write_lines(tmp_path / "lists.jsonl", ROWS))), EXPECTED)
    # No cache beside the user's file.
    assert [entry.name for entry in tmp_path.iterdir()] == ["lists.jsonl"]


def test_blank_lines_and_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD), encoding="utf-8")
    assert len(load_lists(path)) == 2


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "lists.parquet"
    pq.write_table(pa.Table.from_pylist(numeric(ROWS)), path, row_group_size=2)
    check(load_lists(path), EXPECTED)
    assert [entry.name for entry in tmp_path.iterdir()] == ["lists.parquet"]


def test_several_files_are_concatenated_in_order(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "one.jsonl", ROWS[:1])
    second = tmp_path / "two.parquet"
    pq.write_table(pa.Table.from_pylist(numeric(ROWS[1:])), second)
    check(load_lists([first, str(second)]), EXPECTED)


def test_dataset_with_extra_columns_and_selected_rows() -> None:
    dataset = datasets.Dataset.from_list([{**row, "id": i} for i, row in enumerate(numeric(ROWS))])
    check(load_lists(dataset.select([2, 0])), [EXPECTED[2], EXPECTED[0]])


def test_numpy_formatted_dataset() -> None:
    check(load_lists(datasets.Dataset.from_list(numeric(ROWS)).with_format("numpy")), EXPECTED)


def test_rows_in_memory() -> None:
    check(load_lists(ROWS), EXPECTED)


def test_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_list(numeric(ROWS)).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    check(load_lists(tmp_path / "saved"), EXPECTED)
    assert sorted(tmp_path.rglob("*")) == before


def test_saved_splits(tmp_path: Path) -> None:
    parts = {"train": ROWS[:1], "dev": ROWS[1:]}
    splits = {name: datasets.Dataset.from_list(numeric(rows)) for name, rows in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    check(load_lists(tmp_path / "saved"), EXPECTED[:1])
    check(load_lists(tmp_path / "saved", split="dev"), EXPECTED[1:])
    with pytest.raises(ValueError, match=r"saved.*(dev.*test|test.*dev)"):
        load_lists(tmp_path / "saved", split="test")


def test_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(numeric(ROWS))

    monkeypatch.setattr("rerank_fast.data.hub.load_dataset", load_dataset)
    check(load_lists("someone/lists"), EXPECTED)
    check(load_lists("someone/lists", split="dev"), EXPECTED)
    assert asked == [("someone/lists", "train"), ("someone/lists", "dev")]


def test_unreachable_hub_says_how_to_use_a_local_copy() -> None:
    with pytest.raises(ValueError, match=r"someone/not-there.*hub.*local copy"):
        load_lists("someone/not-there")


# -- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["label", "labels", "score", "scores"])
def test_names_of_the_labels(tmp_path: Path, name: str) -> None:
    row = {"query": "q", "docs": ["a", "b"], name: [1, 0]}
    check(
        load_lists(write_lines(tmp_path / "lists.jsonl", [row])), [{**GOOD, "labels": [1.0, 0.0]}]
    )


def test_mapped_columns(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "lists.jsonl", [{"question": "q", "passages": ["a", "b"], "rel": [1, 0]}]
    )
    columns = {"query": "question", "docs": "passages", "labels": "rel"}
    check(load_lists(path, columns=columns), [{**GOOD, "labels": [1.0, 0.0]}])


def test_missing_column_lists_those_there(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lists.jsonl", [{"query": "q", "passages": ["a"], "rel": [1]}])
    with pytest.raises(ValueError, match=r"lists\.jsonl.*passages.*docs"):
        load_lists(path)
    with pytest.raises(ValueError, match=r"nowhere.*passages"):
        load_lists(path, columns={"docs": "nowhere"})


def test_unknown_key_in_columns() -> None:
    with pytest.raises(ValueError, match=r"question"):
        load_lists(ROWS, columns={"question": "query"})


# -- malformed rows -------------------------------------------------------------------------------

MALFORMED = [
    ("query", None),
    ("query", 3),
    ("query", ""),
    ("query", "  \t"),
    ("docs", None),
    ("docs", "a string"),
    ("docs", []),
    ("docs", ["a", None]),
    ("docs", ["a", 7]),
    ("labels", None),
    ("labels", 1),
    ("labels", "10"),
    ("labels", [1]),
    ("labels", [1, 0, 0]),
    ("labels", [1, None]),
    ("labels", [1, "0"]),
    ("labels", [1, [0]]),
    ("labels", [1, math.nan]),
    ("labels", [1, math.inf]),
]


@pytest.mark.parametrize(("field", "value"), MALFORMED)
def test_malformed_line_names_file_line_and_field(tmp_path: Path, field: str, value: Any) -> None:
    path = write_lines(tmp_path / "bad.jsonl", [GOOD, GOOD, {**GOOD, field: value}])
    with pytest.raises(ValueError, match=rf"bad\.jsonl\D*3\b.*{field}"):
        load_lists(path)


# Values that a typed column can hold beside good ones.
TYPED = [(f, v) for f, v in MALFORMED if f == "query" and not isinstance(v, int)]
TYPED += [("docs", None), ("docs", []), ("docs", ["a", None]), ("labels", None), ("labels", [1.0])]
TYPED += [("labels", [1.0, None]), ("labels", [1.0, math.nan]), ("labels", [1.0, math.inf])]


@pytest.mark.parametrize(("field", "value"), TYPED)
@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_malformed_row_of_a_table(tmp_path: Path, kind: str, field: str, value: Any) -> None:
    rows = [*numeric([GOOD, GOOD]), {**numeric([GOOD])[0], field: value}]
    source: Any = datasets.Dataset.from_list(rows)
    if kind == "parquet":
        source = tmp_path / "bad.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source)
    with pytest.raises(
        ValueError, match=rf"{'bad.parquet' if kind == 'parquet' else 'dataset'}.*row 2.*{field}"
    ):
        load_lists(source)


@pytest.mark.parametrize("line", ["{", "", "[1, 2]", "3", "null", '{"query": "q"} {"query": "q"}'])
def test_line_that_is_no_object(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (line or "nothing") + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl\D*2\b"):
        load_lists(path)


def test_field_missing_from_a_later_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "bad.jsonl", [GOOD, {"query": "q", "docs": ["a"]}])
    with pytest.raises(ValueError, match=r"bad\.jsonl\D*2\b.*labels"):
        load_lists(path)


# -- sources that can't be read -------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        load_lists(path)


def test_empty_parquet_and_dataset(tmp_path: Path) -> None:
    empty = pa.Table.from_pylist(numeric([GOOD])).slice(0, 0)
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=r"empty\.parquet"):
        load_lists(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="dataset"):
        load_lists(datasets.Dataset(empty))


def test_other_text_than_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(
        json.dumps(GOOD).encode() + b'\n{"query": "\xe9", "docs": ["a"], "labels": [1]}\n'
    )
    with pytest.raises(ValueError, match=r"latin\.jsonl.*UTF-8"):
        load_lists(path)


def test_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet"):
        load_lists(tmp_path / "bad.parquet")


@pytest.mark.parametrize("name", ["not-there.jsonl", "not-there.parquet", "deep/er/not-there"])
def test_missing_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not-there"):
        load_lists(tmp_path / name)


def test_unknown_suffix_and_foreign_directory(tmp_path: Path) -> None:
    (tmp_path / "lists.csv").write_text("query,docs\n")
    with pytest.raises(ValueError, match=r"lists\.csv"):
        load_lists(tmp_path / "lists.csv")
    with pytest.raises(ValueError, match="save_to_disk"):
        load_lists(tmp_path)


@pytest.mark.parametrize("source", [3, None, []])
def test_no_source(source: Any) -> None:
    with pytest.raises(ValueError):
        load_lists(source)


def test_large_integers_keep_their_float32_value() -> None:
    lists = load_lists([{**GOOD, "labels": [2**24 + 1, 0]}])
    assert lists[0]["labels"][0] == float(np.float32(2**24 + 1))


def test_a_file_has_no_splits(tmp_path: Path):
    file = tmp_path / "lists.jsonl"
    file.write_text('{"query": "q", "docs": ["a"], "labels": [1]}\n')
    with pytest.raises(ValueError, match="a file has no splits"):
        load_lists(file, split="test")
