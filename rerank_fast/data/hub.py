"""Columns of hub datasets and of their local copies, with errors that say what is there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset


def load_hub_dataset(dataset_id: str, subset: str | None, split: str, *, layout: str) -> Dataset:
    """One split of a hub dataset.

    Raises:
        ValueError: the hub does not give it; says whether it is offline and the layout of a local copy.
    """
    try:
        return load_dataset(dataset_id, subset, split=split)
    except Exception as error:  # of many kinds: network, missing configuration, missing split
        name = f"{dataset_id} ({subset}, {split})" if subset else f"{dataset_id} ({split})"
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
        state = "the hub is offline (HF_HUB_OFFLINE)" if offline else "the hub did not give it"
        raise ValueError(
            f"dataset {name} is no local copy, and {state}: {type(error).__name__}: {error}. To use a "
            f"local copy, give the path of one in its place: {layout}."
        ) from error


def read_columns(source: Any, names: Sequence[str], where: str) -> dict[str, list[Any]]:
    """Columns of Parquet or JSONL files of one schema, or of an Arrow table, as Python lists.

    Raises:
        ValueError: a file can't be read, a line of it is no JSON object, or a column is missing
            (lists those that there are).
    """
    import pyarrow
    import pyarrow.dataset

    if isinstance(source, pyarrow.Table):
        table = source
    elif Path(source[0]).suffix == ".parquet":
        try:
            files = [str(file) for file in source]
            table = pyarrow.dataset.dataset(files, format="parquet").to_table()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{where} can't be read as parquet: {error}") from error
    else:
        return _json_columns(source, names, where)
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ValueError(f"{where}: no column {' or '.join(missing)}; there are {sorted(table.column_names)}")
    return {name: table.column(name).to_pylist() for name in names}


def _json_columns(files: Sequence[Path], names: Sequence[str], where: str) -> dict[str, list[Any]]:
    """read_columns of JSONL files; not by pyarrow's reader, whose process a line of null ends."""
    from rerank_fast.data.lists import read_rows  # which reads the hub through this file

    columns: dict[str, list[Any]] = {name: [] for name in names}
    there: set[str] = set()
    for place, row in read_rows([str(file) for file in files]):
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
        there.update(row)
        for name, values in columns.items():
            values.append(row.get(name))
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(f"{where}: no column {' or '.join(missing)}; there are {sorted(there)}")
    return columns
