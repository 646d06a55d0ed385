"""Rows of every layout in every container are the same lists; the log says what they were taken
for.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from rerank_fast.data import ListStream, load_lists
from rerank_fast.data.layouts.choice import LAYOUTS
from rerank_fast.evaluation.candidates import load_candidates
from tests.data.layouts.examples import CONTAINERS, EXAMPLES, MORE, Rows, lists_of, write_lines

NAMES = [layout.NAME for layout in LAYOUTS]


def by_scores(example_lists: Rows, scores: list[list[float]]) -> Rows:
    return [row | {"labels": values} for row, values in zip(example_lists, scores, strict=True)]


def test_every_layout_has_an_example():
    assert sorted(EXAMPLES) == sorted(NAMES)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_same_lists_from_every_container(
    name: str, container: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    example = EXAMPLES[name]
    source = CONTAINERS[container](tmp_path, example.rows)
    with caplog.at_level(logging.INFO, "rerank_fast.data"):
        assert load_lists(source).to_list() == example.lists
    taken = [line for line in caplog.messages if "read as" in line]
    assert len(taken) == 1
    assert all(f"read as {name} (" in line and "\n" not in line for line in taken)
    if example.scores is None:
        with pytest.raises(ValueError, match=f"labels is 'scores', but .* {name}"):
            load_lists(source, labels="scores")
    else:
        assert all("labels='scores' takes" in line for line in taken)
        scored = load_lists(source, labels="scores")
        assert scored.to_list() == by_scores(example.lists, example.scores)


@pytest.mark.parametrize("container", ["jsonl", "csv", "dataset", "pandas"])
@pytest.mark.parametrize("name", MORE)
def test_other_spellings(
    name: str, container: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    layout, rows, expected = MORE[name]
    if (name, container) == ("lists of negatives", "csv"):
        pytest.skip("a cell is one text")
    if (name, container) == ("fewer negatives", "csv"):
        rows = [{key: value or "" for key, value in row.items()} for row in rows]
    with caplog.at_level(logging.INFO, "rerank_fast.data"):
        assert load_lists(CONTAINERS[container](tmp_path, rows)).to_list() == expected
    assert f"read as {layout} (" in caplog.text


@pytest.mark.parametrize("name", EXAMPLES)
def test_only_its_own_layout_matches(name: str):
    columns = [list(EXAMPLES[name].rows[0])]
    columns += [list(rows[0]) for layout, rows, _ in MORE.values() if layout == name]
    for one in columns:
        found = [layout.NAME for layout in LAYOUTS if layout.matches(one)]
        # By order comes last: columns with names that say more are read by them.
        assert found in ([name], [name, "columns by order"])


@pytest.mark.parametrize(
    "columns",
    [
        ["query", "docs"],
        ["docs", "labels"],
        ["query", "labels"],
        ["id", "text"],
        ["query_id", "document_ids", "scores"],
        ["sentence1", "sentence2"],
        ["sentence1", "sentence2", "sentence3", "label"],
        ["query_id", "text", "label"],
        ["query", "negative"],
        [],
    ],
)
def test_where_no_layout_fits_all_are_shown(columns: list[str], tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", [dict.fromkeys(columns, "x")])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no layout has the columns") as raised:
        load_lists(path)
    said = str(raised.value)
    assert "\n" not in said
    assert all(f"{layout.NAME} {layout.EXAMPLE}" in said for layout in LAYOUTS)
    assert "judgements {" in said
    assert "id tables {" in said


def test_a_stream_keeps_nothing_back(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    example = EXAMPLES["pairs"]
    path = write_lines(tmp_path / "a.jsonl", example.rows)
    with caplog.at_level(logging.INFO, "rerank_fast.data"):
        stream = ListStream(path)
        assert [len(row["docs"]) for row in stream] == [
            1
        ] * 4  # no two rows of a query stand together
        assert list(stream) == list(stream)
    assert len(caplog.messages) == 1
    path = write_lines(tmp_path / "b.jsonl", sorted(example.rows, key=lambda row: row["query"]))
    assert list(ListStream(path)) == example.lists
    assert list(ListStream(path, labels="scores")) == by_scores(example.lists, example.scores or [])


def test_a_streams_memory_does_not_grow_with_its_rows():
    read = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal read
        for i in itertools.count():
            read += 1
            yield {"query": f"q{i // 2}", "text": "a", "label": i % 2}

    stream = iter(ListStream(datasets.IterableDataset.from_generator(rows)))
    assert [row["labels"] for row in itertools.islice(stream, 3)] == [[0.0, 1.0]] * 3
    assert read < 5000  # of an endless source


def test_files_of_several_layouts(tmp_path: Path):
    one = write_lines(tmp_path / "a.jsonl", EXAMPLES["lists"].rows)
    two = write_lines(tmp_path / "b.jsonl", EXAMPLES["FlagEmbedding"].rows)
    expected = EXAMPLES["lists"].lists + EXAMPLES["FlagEmbedding"].lists
    assert load_lists([one, two]).to_list() == expected


def test_columns_by_order_of_several_files(tmp_path: Path):
    one = write_lines(
        tmp_path / "a.jsonl", [{"a": "q", "b": "x", "label": 1}, {"label": 0, "b": "y", "a": "q"}]
    )
    two = write_lines(tmp_path / "b.jsonl", [{"c": "q", "d": ["x", "y"], "labels": [1, 0]}])
    assert load_lists([one, two]).to_list() == lists_of(*[("q", "xy", [1, 0])] * 2)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ({"scores": [5, 2, 1]}, [5, 2, 1]),
        ({"label": [3, 4]}, [0, -3, -4]),  # margins, as MarginMSE takes them
        ({"positive_score": 5, "negative_1_score": 2, "negative_2_score": 1}, [5, 2, 1]),
        ({"positive_score": 5, "negative_score_1": 2, "negative_score_2": 1}, [5, 2, 1]),
    ],
)
def test_scores_of_triplets(scores: dict[str, Any], labels: list[float]):
    row = {"query": "q", "positive": "a", "negative_1": "b", "negative_2": "c"} | scores
    assert load_lists([row]).to_list() == lists_of(("q", "abc", [1, 0, 0]))
    assert load_lists([row], labels="scores").to_list() == lists_of(("q", "abc", labels))


def test_passages_as_lists_of_their_fields():
    passages = {"docid": ["1", "2"], "title": ["On it", None], "text": ["a", "b"]}
    row = {"query": "q", "positive_passages": passages, "negative_passages": []}
    assert load_lists([row])["docs"] == [["On it a", "b"]]
    with pytest.raises(
        ValueError, match=r"field positive_passages: lists of several lengths: \[2, 2, 1\]"
    ):
        load_lists([row | {"positive_passages": passages | {"text": ["a"]}}])
    with pytest.raises(
        ValueError, match=r"field positive_passages\.text: expected a list, got str 'a'"
    ):
        load_lists([row | {"positive_passages": passages | {"text": "a"}}])


@pytest.mark.parametrize("kind", ["rows", "dataset", "pandas", "jsonl"])
def test_triplets_are_evaluated(kind: str, tmp_path: Path):
    rows = [
        {"query": "q", "positive": "a", "negative": "b"},
        {"query": "r", "positive": "c", "negative": "d"},
    ]
    found = load_candidates(CONTAINERS[kind](tmp_path, rows))
    assert [list(one.docs) for one in found] == [["a", "b"], ["c", "d"]]
    assert [one.labels.tolist() for one in found] == [[1, 0]] * 2
    more = [{**row, "negative_1": row["negative"], "negative_2": "e"} for row in rows]
    more = [{key: value for key, value in row.items() if key != "negative"} for row in more]
    assert [len(one.docs) for one in load_candidates(CONTAINERS[kind](tmp_path, more))] == [3, 3]


def test_a_margin_of_a_triplet():
    row = {"query": "q", "positive": "a", "negative": "b", "score": 2.5}
    assert load_lists([row], labels="scores").to_list() == lists_of(("q", "ab", [0, -2.5]))


@pytest.mark.parametrize("name", ["pairs", "triplets"])
def test_columns_under_other_names(name: str, tmp_path: Path):
    rows = EXAMPLES[name].rows
    own = {"pairs": {"document": "passage", "label": "label"}, "triplets": {"positive": "positive"}}
    columns = {field: f"my_{column}" for field, column in own[name].items()}
    renamed = [
        {(f"my_{k}" if f"my_{k}" in columns.values() else k): v for k, v in row.items()}
        for row in rows
    ]
    path = write_lines(tmp_path / "a.jsonl", renamed)
    assert load_lists(path, columns=columns).to_list() == EXAMPLES[name].lists
    broken = [*renamed, renamed[0] | {next(iter(columns.values())): None}]
    with pytest.raises(ValueError, match=rf"a\.jsonl, line {len(rows) + 1}, field my_"):
        load_lists(write_lines(path, broken), columns=columns)
