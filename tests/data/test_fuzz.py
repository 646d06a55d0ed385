"""Data files damaged at random: one line that names the file, or rows as the schema has them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rerank_fast.data import ListStream, load_lists
from rerank_fast.data.hub import read_columns
from rerank_fast.data.mining.sources import load_collection
from rerank_fast.data.pairs import PairFile
from rerank_fast.evaluation.candidates import load_candidates

ROWS = [
    {"query": f"query {n} né", "docs": [f"a {n}", "b\U0001f43c"], "labels": [1.0, 0.0], "id": n}
    for n in range(40)
]
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    2.5,
    1e400,
    2**80,
    "",
    "text",
    "\ud800",
    [],
    [3],
    ["x"],
    {},
    {"a": [1]},
]


def read_pairs(path: Path) -> None:
    for block in PairFile(path, {}, ["id", "labels"], 7).blocks(lambda index: True):
        assert all(isinstance(text, str) for pair in block.pairs for text in pair)
        assert block.sizes is not None
        assert sum(block.sizes) == len(block.pairs)


def read_lists(path: Path) -> None:
    for row in load_lists(path).to_list():
        assert isinstance(row["query"], str)
        assert len(row["docs"]) == len(row["labels"]) > 0


READERS: dict[str, Callable[[Path], Any]] = {
    "load_lists": read_lists,
    "ListStream": lambda path: list(ListStream(path)),
    "load_candidates": load_candidates,
    "load_collection": load_collection,
    "PairFile": read_pairs,
    "read_columns": lambda path: read_columns([path], ("query", "docs"), str(path)),
}


def damage_rows(draw: random.Random) -> bytes:
    """JSON lines with values of other types, or fields that are missing or called otherwise."""
    rows: list[Any] = [json.loads(json.dumps(row)) for row in ROWS]
    for _ in range(draw.randrange(1, 3)):
        n = draw.randrange(len(rows))
        kind = draw.choice(["row", "field", "element", "without", "renamed"])
        if kind == "row":
            rows[n] = draw.choice(VALUES)
        elif isinstance(rows[n], dict) and rows[n]:
            field = draw.choice(list(rows[n]))
            if kind == "field":
                rows[n][field] = draw.choice(VALUES)
            elif kind == "without":
                del rows[n][field]
            elif kind == "renamed":
                rows[n][draw.choice(["document", "positive", "score"])] = rows[n].pop(field)
            elif isinstance(rows[n][field], list) and rows[n][field]:
                rows[n][field][0] = draw.choice(VALUES)
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def damage_bytes(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 3, 50])):
        start = draw.randrange(len(content))
        kind = draw.choice(["flip", "flip", "overwrite", "remove", "insert"])
        if kind == "flip":
            changed[start % len(changed)] ^= 1 << draw.randrange(8)
        elif kind == "overwrite":
            changed[start : start + 8] = draw.randbytes(8)
        elif kind == "remove":
            del changed[start : start + draw.randrange(1, 20)]
        else:
            changed[start:start] = draw.randbytes(draw.randrange(1, 20))
    return bytes(changed[: draw.randrange(1, len(changed))] if draw.random() < 0.1 else changed)


def table_bytes(draw: random.Random) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS),
        sink,
        row_group_size=15,
        compression=draw.choice(["snappy", "none"]),
        use_dictionary=draw.choice([True, False]),
    )
    return sink.getvalue().to_pybytes()


def check(path: Path, seed: int) -> int:
    """How many readers read the damaged file."""
    draw = random.Random(seed)
    if path.suffix == ".parquet":
        path.write_bytes(damage_bytes(draw, table_bytes(draw)))
    elif draw.random() < 0.5:
        path.write_bytes(damage_rows(draw))
    else:
        path.write_bytes(
            damage_bytes(draw, b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
        )
    read = 0
    for name, reader in READERS.items():
        try:
            reader(path)
            read += 1
        except ValueError as error:
            said = str(error)
            assert "\n" not in said, f"seed {seed}, {name}: {said}"
            named = path.name in said or said.startswith("none of the")
            assert named, f"seed {seed}, {name}: {said}"
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {name}: {type(error).__name__}: {error}") from error
    return read


def fuzz(path: Path, seeds: range) -> None:
    read = sum(check(path, seed) for seed in seeds)
    every = len(READERS) * len(seeds)
    assert every // 50 < read < every  # else nothing was damaged, or all was


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_damaged_files(tmp_path: Path, suffix: str):
    fuzz(tmp_path / f"lists.{suffix}", range(150))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_many_damaged_files(tmp_path: Path, suffix: str):
    fuzz(tmp_path / f"lists.{suffix}", range(1000, 11_000))
