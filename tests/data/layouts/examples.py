"""One source of each layout of rows, the lists that it is, and how it is written to a file."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """Rows, the lists of their relevance, and the labels of the same documents by a teacher."""

    rows: Rows
    lists: Rows
    scores: list[list[float]] | None = None


def lists_of(*lists: tuple[str, Sequence[str], Sequence[float]]) -> Rows:
    return [{"query": q, "docs": list(docs), "labels": list(values)} for q, docs, values in lists]


TWO = lists_of(
    ("panda ü", ["bear", "fish, sea"], [1.0, 0.0]), ("rain", ["sun", "wind"], [0.0, 2.5])
)
POSITIVE = lists_of(
    ("panda ü", ["bear", "fish", "sea"], [1, 0, 0]), ("rain", ["wet", "sun", ""], [1, 0, 0])
)
SCORES = [[9.5, 2.5, -1.0], [7.0, 0.25, -3.0]]

EXAMPLES = {
    "lists": Example(
        [row | {"scores": [4.0, -2.5]} for row in TWO], TWO, [[4.0, -2.5], [4.0, -2.5]]
    ),
    "triplets": Example(
        [
            {
                "query": row["query"],
                "positive": row["docs"][0],
                "negative_1": row["docs"][1],
                "negative_2": row["docs"][2] or "none",
                "scores": scores,
            }
            for row, scores in zip(POSITIVE, SCORES, strict=True)
        ],
        [row | {"docs": [doc or "none" for doc in row["docs"]]} for row in POSITIVE],
        SCORES,
    ),
    "FlagEmbedding": Example(
        [
            {
                "query": row["query"],
                "pos": row["docs"][:1],
                "neg": row["docs"][1:],
                "pos_scores": scores[:1],
                "neg_scores": scores[1:],
                "prompt": "Find it.",
            }
            for row, scores in zip(POSITIVE, SCORES, strict=True)
        ],
        POSITIVE,
        SCORES,
    ),
    "Tevatron": Example(
        [
            {
                "query_id": "7",
                "query": row["query"],
                "positive_passages": [{"docid": "1", "title": "On it", "text": row["docs"][0]}],
                "negative_passages": [
                    {"docid": "2", "title": "", "text": row["docs"][1]},
                    {"docid": "3", "title": None, "text": row["docs"][2]},
                ],
            }
            for row in POSITIVE
        ],
        [row | {"docs": ["On it " + row["docs"][0], *row["docs"][1:]]} for row in POSITIVE],
    ),
    "pairs": Example(
        # The rows of a query do not stand together.
        [
            {
                "query": row["query"],
                "passage": row["docs"][i],
                "label": row["labels"][i],
                "score": i - 0.5,
            }
            for i in range(2)
            for row in TWO
        ],
        TWO,
        [[-0.5, 0.5], [-0.5, 0.5]],
    ),
    "columns by order": Example(
        [
            {"label": row["labels"][i], "sentence1": row["query"], "sentence2": row["docs"][i]}
            for row in TWO
            for i in range(2)
        ],
        TWO,
    ),
}
MORE = {
    "lists, question": (
        "lists",
        [{"question": r["query"], "docs": r["docs"], "score": r["labels"]} for r in TWO],
        TWO,
    ),
    "labelled lists": (
        "columns by order",
        [{"anchor": r["query"], "answer_list": r["docs"], "labels": r["labels"]} for r in TWO],
        TWO,
    ),
    "labelled lists of mined positives": (
        "columns by order",
        [{"anchor": r["query"], "positive": r["docs"], "labels": r["labels"]} for r in TWO],
        TWO,
    ),
    "labelled pairs of mined positives": (
        "columns by order",
        [
            {"query": r["query"], "positive": doc, "score": value}
            for r in TWO
            for doc, value in zip(r["docs"], r["labels"], strict=True)
        ],
        TWO,
    ),
    "positives alone": (
        "triplets",
        [{"anchor": r["query"], "positive": r["docs"][0]} for r in POSITIVE],
        lists_of(*((r["query"], r["docs"][:1], [1.0]) for r in POSITIVE)),
    ),
    "lists of negatives": (
        "triplets",
        [
            {"query": r["query"], "positive": r["docs"][0], "negatives": r["docs"][1:]}
            for r in POSITIVE
        ],
        POSITIVE,
    ),
    "fewer negatives": (
        "triplets",
        [
            {
                "query": "q",
                "positive": "a",
                "negative_1": "b",
                "negative_2": "c",
                "negative_10": "d",
            },
            {
                "query": "r",
                "positive": "a",
                "negative_1": "b",
                "negative_2": None,
                "negative_10": "d",
            },
        ],
        lists_of(("q", "abcd", [1, 0, 0, 0]), ("r", "abd", [1, 0, 0])),
    ),
}


def write_lines(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, rows: Rows, delimiter: str = ",") -> Path:
    """Lists and objects as JSON in their cells."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    k: v if isinstance(v, str | float | int) else json.dumps(v)
                    for k, v in row.items()
                }
            )
    return path


def _gz(path: Path, rows: Rows) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def _zst(path: Path, rows: Rows) -> Path:
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def _array(path: Path, rows: Rows) -> Path:
    path.write_text("\n" + json.dumps(rows, indent=1), encoding="utf-8")
    return path


def _parquet(path: Path, rows: Rows) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _saved(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


class Frame:
    """What polars and others give: a table by Arrow's protocol alone."""

    def __init__(self, table: pyarrow.Table) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.table.__arrow_c_stream__(requested_schema)


def _split(folder: Path, rows: Rows) -> str:
    """A file a row, and the glob of them."""
    for i, row in enumerate(rows):
        write_lines(folder / f"part-{i}.jsonl", [row])
    return str(folder / "part-*.jsonl")


CONTAINERS: dict[str, Callable[[Path, Rows], Any]] = {
    "rows": lambda folder, rows: rows,
    "jsonl": lambda folder, rows: write_lines(folder / "a.jsonl", rows),
    "jsonl.gz": lambda folder, rows: _gz(folder / "a.jsonl.gz", rows),
    "jsonl.zst": lambda folder, rows: _zst(folder / "a.jsonl.zst", rows),
    "json": lambda folder, rows: _array(folder / "a.json", rows),
    "csv": lambda folder, rows: write_table(folder / "a.csv", rows),
    "tsv": lambda folder, rows: write_table(folder / "a.tsv", rows, "\t"),
    "parquet": lambda folder, rows: _parquet(folder / "a.parquet", rows),
    "glob": _split,
    "dataset": lambda folder, rows: datasets.Dataset.from_list(rows),
    "iterable": lambda folder, rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "splits": lambda folder, rows: datasets.DatasetDict(train=datasets.Dataset.from_list(rows)),
    "saved": lambda folder, rows: _saved(folder / "saved", rows),
    "pandas": lambda folder, rows: pandas.DataFrame(rows),
    "arrow": lambda folder, rows: pyarrow.Table.from_pylist(rows),
    "batch": lambda folder, rows: pyarrow.RecordBatch.from_pylist(rows),
    "stream": lambda folder, rows: Frame(pyarrow.Table.from_pylist(rows)),
}
