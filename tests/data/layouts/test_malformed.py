"""Each malformed field of each layout is named with its file and its row."""

from __future__ import annotations

import decimal
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rerank_fast.data import load_lists
from tests.data.layouts.examples import CONTAINERS, EXAMPLES, write_lines, write_table

TEXT, TEXTS, NUMBER, NUMBERS, PASSAGES = "text", "texts", "number", "numbers", "passages"
FIELDS = {
    "lists": {"query": TEXT, "docs": TEXTS, "labels": NUMBERS},
    "triplets": {"query": TEXT, "positive": TEXT, "negative_1": TEXT},
    "FlagEmbedding": {"query": TEXT, "pos": TEXTS, "neg": TEXTS},
    "Tevatron": {"query": TEXT, "positive_passages": PASSAGES, "negative_passages": PASSAGES},
    "pairs": {"query": TEXT, "passage": TEXT, "label": NUMBER},
    "columns by order": {"sentence1": TEXT, "sentence2": TEXT, "label": NUMBER},
}
SCORES = {
    "lists": {"scores": NUMBERS},
    "triplets": {"scores": NUMBERS},
    "FlagEmbedding": {"pos_scores": NUMBERS, "neg_scores": NUMBERS},
    "pairs": {"score": NUMBER},
}
BAD = {
    TEXT: [None, 3, {"a": 1}, "\ud800"],
    TEXTS: [None, 3, "text", ["a", None], ["a", 7]],
    NUMBER: [None, "1", [1], math.nan, math.inf, 1e39],
    NUMBERS: [None, 1.5, "1", ["1", 0], [1, None], [1, [0]], [1, math.nan], [10**400]],
    PASSAGES: [
        None,
        "text",
        ["text"],
        [{"docid": "1"}],
        [{"text": 3}],
        [{"text": "a", "title": 3}],
    ],
}
CASES = [
    (name, field, value, labels)
    for labels, fields in (("relevance", FIELDS), ("scores", SCORES))
    for name, kinds in fields.items()
    for field, kind in kinds.items()
    for value in BAD[kind]
    if (name, field, value) not in (("triplets", "negative_1", None), ("triplets", "scores", 1.5))
]


@pytest.mark.parametrize(("name", "field", "value", "labels"), CASES)
def test_a_malformed_field_is_named(tmp_path: Path, name: str, field: str, value: Any, labels: Any):
    rows = [*EXAMPLES[name].rows, EXAMPLES[name].rows[0] | {field: value}]
    path = write_lines(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line {len(rows)}\b.*{field}") as raised:
        load_lists(path, labels=labels)
    assert "\n" not in str(raised.value)
    if not isinstance(value, float | int) or math.isfinite(value):
        with pytest.raises(ValueError, match=rf"list, row {len(rows) - 1}\b.*{field}"):
            load_lists(rows, labels=labels)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_field_that_a_later_row_lacks(tmp_path: Path, name: str):
    example = EXAMPLES[name]
    for field in FIELDS[name]:
        if field == "negative_1":  # of which rows may have fewer
            continue
        rows = [*example.rows, {**example.rows[0]}]
        del rows[-1][field]
        path = write_lines(tmp_path / "bad.jsonl", rows)
        with pytest.raises(
            ValueError, match=rf"bad\.jsonl, line {len(rows)}: not of the layout {name},"
        ):
            load_lists(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lists", {"labels": [1]}, "2 documents in docs but 1 labels in labels"),
        ("lists", {"docs": [], "labels": []}, "field docs: no documents"),
        ("FlagEmbedding", {"pos": [], "neg": []}, "field pos: no documents"),
        ("Tevatron", {"positive_passages": [], "negative_passages": []}, "no documents"),
        ("pairs", {"query": " "}, "field query: the string is empty"),
        ("lists", {"query": ""}, "field query: the string is empty"),
    ],
)
def test_a_row_that_does_not_add_up(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
):
    rows = [EXAMPLES[name].rows[0], EXAMPLES[name].rows[0] | change]
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2\b.*{message}"):
        load_lists(write_lines(tmp_path / "bad.jsonl", rows))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("triplets", {"scores": [1, 2]}, ""),
        ("triplets", {"scores": [1, 2, 3, 4]}, "3 documents in positive but 4 labels in scores"),
        ("FlagEmbedding", {"pos_scores": [1, 2]}, "field pos_scores: 2 scores, but 1 texts in pos"),
        ("lists", {"scores": [1]}, "2 documents in docs but 1 labels in scores"),
    ],
)
def test_scores_that_do_not_add_up(tmp_path: Path, name: str, change: dict[str, Any], message: str):
    path = write_lines(tmp_path / "bad.jsonl", [EXAMPLES[name].rows[0] | change])
    load_lists(path)  # whose labels they are not
    if message:
        with pytest.raises(ValueError, match=rf"bad\.jsonl, line 1\b.*{message}"):
            load_lists(path, labels="scores")
    else:
        assert load_lists(path, labels="scores")["labels"] == [[0, -1, -2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('query,document,label\nq,"a\nb",1\nq,c\n', "line 4: 2 cells, but 3 columns"),
        (
            "query,document,label\nq,a,1\n\nq,c,one\n",
            "line 4, field label: expected a finite float32, got 'one'",
        ),
        ("query,document,label\nq,a,\n", "line 2, field label: expected a finite float32, got ''"),
        ("query,document,query\nq,a,1\n", "line 1: two columns have one name"),
        ('query,document,label\nq,"a,1\n', "line 2: not a row of a table"),
        ('query,document,label\nq,"a"b,1\n', "line 2: not a row of a table"),
        (
            "query,docs,labels\nq,a,1\n",
            r"line 2, field docs: expected a list as JSON writes it, got str 'a'",
        ),
        (
            "query,docs,labels\nq,\"['a']\",[1]\n",
            "line 2, field docs: expected a list as JSON writes it",
        ),
        ("query,document,label\n", "holds no list"),
        ("", "holds no list"),
    ],
)
def test_a_table_of_text_that_is_damaged(tmp_path: Path, content: str, message: str):
    path = tmp_path / "bad.csv"
    path.write_text(content, newline="")
    with pytest.raises(ValueError, match=rf"bad\.csv,? {message}"):
        load_lists(path)


def test_cells_may_hold_anything(tmp_path: Path):
    texts = [
        "a, b",
        'say "no"',
        "two\nlines",
        "two\r\nlines",
        "[1] a reference",
        "x" * 200_000,
        "é\U0001f43c",
    ]
    rows = [{"query": "q", "document": text, "label": i} for i, text in enumerate(texts)]
    for path in (
        write_table(tmp_path / "a.csv", rows),
        write_table(tmp_path / "a.tsv", rows, "\t"),
    ):
        assert load_lists(path)["docs"] == [texts]
    rows = [{"sentence1": "q", "sentence2": text, "label": i} for i, text in enumerate(texts)]
    assert load_lists(write_table(tmp_path / "b.csv", rows))["docs"] == [texts]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl.zst", b"no zstd"),
        ("a.csv.gz", b""),
        ("a.json", b"[1, 2"),
        ("a.json", b'[{"query": "\xff"}]'),
        ("a.json", b"[" * 100_000),
        ("a.json", b"[3]"),
        ("a.csv", b"query,document,label\n\xff,a,1\n"),
        ("a.tsv", b"\xff"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}"):
        load_lists(tmp_path / name)


def test_a_compressed_file_that_is_cut_off(tmp_path: Path):
    rows = [
        {"query": f"q{np.random.default_rng(i).random(9)}", "docs": ["a"], "labels": [1]}
        for i in range(500)
    ]
    for kind in ("jsonl.gz", "jsonl.zst"):
        path = CONTAINERS[kind](tmp_path, rows)
        path.write_bytes(path.read_bytes()[:-400])
        with pytest.raises(ValueError, match=rf"a\.{kind}"):
            load_lists(path)


REALS = [
    2,
    True,
    2.5,
    np.float16(2.5),
    np.int64(3),
    np.bool_(True),
    np.array(2.5),
    np.longdouble(1.5),
    torch.tensor(2.5, dtype=torch.bfloat16),
    torch.tensor(3),
    decimal.Decimal("0.1"),
    Fraction(1, 3),
]


@pytest.mark.parametrize("number", REALS, ids=lambda value: f"{type(value).__name__} {value}")
def test_any_real_number_is_a_label(number: Any):
    expected = float(np.float32(float(number)))
    assert load_lists([{"query": "q", "docs": ["a", "b"], "labels": [number, 0]}])["labels"] == [
        [expected, 0]
    ]
    for row in (
        {"query": "q", "document": "a", "label": number},
        {"x": "q", "y": "a", "score": number},
    ):
        assert load_lists([row])["labels"] == [[expected]]
    if not isinstance(number, torch.Tensor):
        frame = pandas.DataFrame(
            {"query": ["q"], "text": ["a"], "label": pandas.Series([number], dtype=object)}
        )
        assert load_lists(frame)["labels"] == [[expected]]


@pytest.mark.parametrize(
    "labels", [torch.tensor([1.5, 0]), np.array([1.5, 0]), (decimal.Decimal("1.5"), 0)]
)
def test_arrays_of_numbers_are_labels(labels: Any):
    assert load_lists([{"query": "q", "docs": ["a", "b"], "labels": labels}])["labels"] == [
        [1.5, 0.0]
    ]


@pytest.mark.parametrize(
    "number",
    [
        None,
        "1",
        b"1",
        1j,
        math.nan,
        decimal.Decimal("sNaN"),
        decimal.Decimal("1e99"),
        torch.tensor([1]),
    ],
)
def test_what_is_no_finite_number(number: Any):
    with pytest.raises(
        ValueError, match=r"list, row 0, field labels\[0\]: expected a finite float32, got"
    ):
        load_lists([{"query": "q", "docs": ["a"], "labels": [number]}])


def test_a_decimal_column():
    table = pyarrow.table(
        {"query": ["q"], "text": ["a"], "label": pyarrow.array([decimal.Decimal("1.50")])}
    )
    assert load_lists(table)["labels"] == [[1.5]]


def test_a_column_of_pandas_with_gaps():
    frame = pandas.DataFrame(
        {
            "query": ["q", "r"],
            "positive": ["a", "b"],
            "negative_1": ["c", "d"],
            "negative_2": ["e", None],
        }
    )
    assert load_lists(frame)["docs"] == [["a", "c", "e"], ["b", "d"]]
    with pytest.raises(
        ValueError, match="DataFrame, row 1, field label: expected a finite float32, got None"
    ):
        load_lists(pandas.DataFrame({"query": ["q", "r"], "text": ["a", "b"], "label": [1, None]}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda one: (
        st.lists(one, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "pid", "a"]), one, max_size=2)
    ),
    max_leaves=4,
)
COLUMNS = [
    "query",
    "docs",
    "labels",
    "positive",
    "negative",
    "pos",
    "neg",
    "score",
    "text",
    "passages",
]


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=4) | JSON, max_size=4),
    labels=st.sampled_from(["relevance", "scores"]),
)
def test_nothing_but_a_value_error_comes_of_any_rows(tmp_path: Path, rows: list[Any], labels: Any):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        found = load_lists(path, labels=labels)
    except ValueError as error:
        assert "a.jsonl" in str(error)  # noqa: PT017 - either is right
    else:
        assert all(len(row["docs"]) == len(row["labels"]) > 0 for row in found)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["a.csv", "a.tsv", "a.json", "a.jsonl", "a.csv.gz", "a.jsonl.zst"]),
    content=st.binary(max_size=60)
    | st.text(st.sampled_from('query,document\t\n"1[]{}:\r '), max_size=60).map(str.encode)
    | st.text(st.sampled_from(',\t\n"1a'), max_size=30).map(
        lambda end: b"query,text,label\nq,a,1\n" + end.encode()
    ),
)
def test_nothing_but_a_value_error_comes_of_any_bytes(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    try:
        found = load_lists(tmp_path / name)
    except ValueError as error:
        assert name in str(error)  # noqa: PT017
    else:
        assert all(len(row["docs"]) == len(row["labels"]) > 0 for row in found)
