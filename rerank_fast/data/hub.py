"""Columns of hub datasets and of their local copies, with errors that say what is there."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, load_dataset

from rerank_fast.data.files import (
    numbered_lines,
    open_parquet,
    parse_line,
    python_values,
    table_batches,
)
from rerank_fast.model.texts import shown


def load_hub_dataset(dataset_id: str, subset: str | None, split: str, *, layout: str) -> Dataset:
    """One split of a hub dataset.

    Raises:
        ValueError: the hub does not give it; says whether it is offline and the layout of a local
            copy.
    """
    try:
        return load_dataset(dataset_id, subset, split=split)
    except Exception as error:  # of many kinds: network, missing configuration, missing split
        name = f"{dataset_id} ({subset}, {split})" if subset else f"{dataset_id} ({split})"
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
        state = "the hub is offline (HF_HUB_OFFLINE)" if offline else "the hub did not give it"
        raise ValueError(
            f"dataset {name} is no local copy, and {state}: {type(error).__name__}: {error}. To "
            f"use a local copy, give the path of one in its place: {layout}."
        ) from error


def read_columns(source: Any, names: Sequence[str], where: str) -> dict[str, list[Any]]:
    """Columns of Parquet or JSONL files, or of an Arrow table, as Python lists.

    Raises:
        ValueError: a file can't be read, a row of it is malformed, or a column is missing (lists
            those that there are).
    """
    if isinstance(source, pyarrow.Table):
        _check_columns(names, source.column_names, where)
        return {name: python_values(source.column(name), name, where) for name in names}
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for path in map(Path, source):
        if path.suffix == ".parquet":
            with open_parquet(path) as file:
                _check_columns(names, file.schema_arrow.names, where)
                for first, batch in table_batches(file, path, columns=list(names)):
                    for name in names:
                        columns[name] += python_values(batch.column(name), name, str(path), first)
            continue
        for number, line in numbered_lines(path):
            place = f"{path}, line {number}"
            row = parse_line(place, line)
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected a JSON object, got {shown(row)}")
            _check_columns(names, row, place)
            for name in names:
                columns[name].append(row[name])
    return columns


def _check_columns(names: Sequence[str], there: Collection[str], where: str) -> None:
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(f"{where}: no column {' or '.join(missing)}; there are {sorted(there)}")
