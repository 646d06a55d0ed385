from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rerank_fast.data import load_ms_marco
from tests.stand_ins import make_ms_marco


def test_queries_without_a_selected_passage_are_dropped(tmp_path: Path) -> None:
    make_ms_marco(tmp_path, count=20)
    file = tmp_path / "v1.1" / "train-00000-of-00001.parquet"
    rows = pyarrow.parquet.read_table(file).to_pylist()
    kept = [row for row in rows if sum(row["passages"]["is_selected"])]
    assert len(kept) == 16
    for source in (tmp_path, file):
        lists = load_ms_marco(source)
        assert lists["query"][:] == [row["query"] for row in kept]
        assert lists["docs"][:] == [row["passages"]["passage_text"] for row in kept]
        assert lists["labels"][:] == [row["passages"]["is_selected"] for row in kept]


def test_json_lines_as_the_hub_writes_them(tmp_path: Path) -> None:
    make_ms_marco(tmp_path)
    rows = pyarrow.parquet.read_table(
        tmp_path / "v1.1" / "train-00000-of-00001.parquet"
    ).to_pylist()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_ms_marco(tmp_path / "other").to_list() == load_ms_marco(tmp_path).to_list()


def write(file: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "texts": ["a"]}, r"no column passages; there are \['query', 'texts'\]"),
        (
            {"query": "q", "passages": {"passage_text": ["a"], "url": ["u"]}},
            r"row 0: passages lacks \['is_selected'\]; there are \['passage_text', 'url'\]",
        ),
        (
            {"query": "q", "passages": {"passage_text": ["a"], "is_selected": [0]}},
            "none of 1 queries has a selected",
        ),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_ms_marco(write(tmp_path / "rows.parquet", [row]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("null", r"train.jsonl, line 2: expected a JSON object, got NoneType"),
        ("3", "line 2: expected a JSON object, got int"),
        ('{"query":', "line 2: not a JSON object"),
        ('{"query": "q", "passages": [1]}', r"row 1: passages must be an object, got \[1\]"),
        ('{"query": "q", "passages": null}', "row 1: passages lacks"),
        (
            '{"query": "q", "passages": {"passage_text": ["a"], "is_selected": 1}}',
            "row 1: is_selected must be a list, got 1",
        ),
    ],
)
def test_a_malformed_line_is_named_and_does_not_end_the_process(
    tmp_path: Path, line: str, message: str
) -> None:
    good = {"query": "q", "passages": {"passage_text": ["a"], "is_selected": [1]}}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        load_ms_marco(tmp_path)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"microsoft/ms_marco \(v1.1, train\).*offline.*local copy.*train-\*"
    ):
        load_ms_marco()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        ValueError, match=r"has no v1.1/train-\*.parquet.*there are \['notes.txt'\]"
    ):
        load_ms_marco(tmp_path)
