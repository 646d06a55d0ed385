"""Lists from files, datasets and the hub: one schema, every malformed row an error that says where it is.

JSON lines are checked value by value as they are parsed; Arrow data (Parquet, datasets) column by column.
Nothing is written: results live in memory or on the memory map of a dataset that was on disk already.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Union

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

Source = Union[str, Path, Sequence[Union[str, Path]], Sequence[Mapping[str, Any]], "datasets.Dataset"]

_CANONICAL = ("query", "docs", "labels")
_ALIASES = {"query": ("query",), "docs": ("docs",), "labels": ("labels", "label", "scores", "score")}
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ROWS_PER_BATCH = 10_000  # keeps each Arrow string column far below its limit of 2 GiB
_FLOAT32_MAX = 3.4028234663852886e38


def load_lists(
    source: Source, *, columns: Mapping[str, str] | None = None, split: str | None = None
) -> datasets.Dataset:
    """Lists of documents with their labels, one row per query.

    Args:
        source: a .jsonl (.json, .ndjson: one object per line) or .parquet file, or a list of such files, which
            are concatenated; a `datasets.Dataset` or `DatasetDict`, or a directory where one was saved by
            `save_to_disk`; a dataset's id on the Hugging Face hub; or a list of row dicts.
        columns: the source's name for any of "query", "docs", "labels", e.g. {"docs": "passages"}. Without it,
            labels may also be called label, scores or score.
        split: which split of a DatasetDict or hub dataset; "train" when not given.

    Returns:
        A Dataset with columns query: string, docs: list of strings, labels: list of float32. Every row has a
        query that is not blank, at least one document, and one finite label per document.

    Raises:
        ValueError: no readable source, missing columns, or a malformed row. Names the file, the line (JSON,
            from 1) or row (otherwise, from 0), and the field.
    """
    import datasets

    columns = _check_mapping(columns)
    if isinstance(source, (datasets.Dataset, datasets.DatasetDict)):
        return _from_dataset(source, columns, split, where="the dataset")
    if isinstance(source, (str, Path)):
        return _from_path(source, columns, split)
    if not isinstance(source, Sequence) or isinstance(source, bytes):
        raise ValueError(
            "expected a path, a list of paths, a datasets.Dataset, a hub id or a list of row dicts, "
            f"got {type(source).__name__}"
        )
    if not source:
        raise ValueError("expected at least one file or row, got an empty list")
    if isinstance(source[0], Mapping):
        _refuse_split(split, "rows in memory")
        numbered = ((f"row {index}", row) for index, row in enumerate(source))
        return _from_rows(numbered, columns)
    for index, item in enumerate(source):
        if not isinstance(item, (str, Path)):
            raise ValueError(f"expected paths in the list of sources, got {type(item).__name__} at index {index}")
    return datasets.concatenate_datasets([_from_path(item, columns, split) for item in source])  # type: ignore[arg-type]


# -- sources ------------------------------------------------------------------------------------------------


def _from_path(source: str | Path, columns: Mapping[str, str], split: str | None) -> datasets.Dataset:
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _from_directory(path, columns, split)
        if path.is_file():
            suffix = path.suffix.lower()
            if suffix in _JSON_SUFFIXES:
                _refuse_split(split, f"{path}")
                return _from_rows(_read_json_lines(path), columns)
            if suffix == ".parquet":
                _refuse_split(split, f"{path}")
                return _from_parquet(path, columns)
            known = ", ".join((*_JSON_SUFFIXES, ".parquet"))
            raise ValueError(f"{path}: expected a file that ends in one of {known}, got {path.suffix or path.name!r}")
    except OSError as error:
        raise ValueError(f"{path}: could not be read: {error}") from error
    looks_like_file = path.suffix.lower() in (*_JSON_SUFFIXES, ".parquet")
    if looks_like_file or not _HUB_ID.fullmatch(str(source)) or str(source) in (".", ".."):
        raise ValueError(f"{path}: no such file or directory")
    return _from_hub(str(source), columns, split)


def _from_directory(path: Path, columns: Mapping[str, str], split: str | None) -> datasets.Dataset:
    import datasets

    if not ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"{path}: expected a directory saved by datasets' save_to_disk, got one that holds {found}; "
            "pass the .jsonl or .parquet files themselves to read them"
        )
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{path}: datasets could not load this directory: {error}") from error
    return _from_dataset(dataset, columns, split, where=str(path))


def _from_hub(name: str, columns: Mapping[str, str], split: str | None) -> datasets.Dataset:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub's client raises whatever its transport does
        raise ValueError(
            f"{name!r} is neither a file nor a directory here, and as a dataset on the Hugging Face hub it could "
            f"not be loaded (split {split or 'train'!r}): the hub does not have it or could not be reached "
            f"({type(error).__name__}: {error}). For a local copy pass the path of a .jsonl or .parquet file, or "
            "of a directory written by Dataset.save_to_disk."
        ) from error
    return _from_dataset(dataset, columns, None, where=f"hub dataset {name!r}")


def _from_dataset(
    dataset: datasets.Dataset | datasets.DatasetDict, columns: Mapping[str, str], split: str | None, *, where: str
) -> datasets.Dataset:
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        if (split or "train") not in dataset:
            raise ValueError(f"{where}: no split {split or 'train'!r}; it has {', '.join(map(str, dataset)) or 'none'}")
        dataset = dataset[split or "train"]
    elif split is not None and str(dataset.split) != split:
        raise ValueError(f"{where}: expected split {split!r}, got a single dataset of split {str(dataset.split)!r}")
    names = _resolve(dataset.column_names, columns, where)
    # Features such as audio or nested types keep their Arrow form: the checks look at Arrow types only.
    rows = dataset.select_columns([names[name] for name in _CANONICAL]).with_format("arrow")
    return _from_tables(rows.iter(_ROWS_PER_BATCH), names, where)


def _from_parquet(path: Path, columns: Mapping[str, str]) -> datasets.Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = _resolve(file.schema_arrow.names, columns, str(path))
            wanted = [names[name] for name in _CANONICAL]
            batches = (pa.Table.from_batches([b]) for b in file.iter_batches(_ROWS_PER_BATCH, columns=wanted))
            return _from_tables(batches, names, str(path))
    except pa.ArrowException as error:
        if isinstance(error, ValueError) and not isinstance(error, pa.ArrowInvalid):
            raise
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _from_tables(tables: Iterator[pa.Table], names: Mapping[str, str], where: str) -> datasets.Dataset:
    """Check and convert tables that hold the named columns of consecutive rows."""
    import pyarrow as pa

    schema = _arrow_schema()
    parts, first_row = [], 0
    for table in tables:
        table = table.combine_chunks()
        source = {name: _only_chunk(table[names[name]]) for name in _CANONICAL}
        arrays = _check_columns(source, names, where, first_row)
        parts.append(pa.Table.from_arrays([arrays[name] for name in _CANONICAL], schema=schema))
        first_row += table.num_rows
    return _as_dataset(parts, where)


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: expected UTF-8 text: {error}") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: expected one JSON object per line: {error}") from error
    

def _from_rows(rows: Iterator[tuple[str, Any]], columns: Mapping[str, str]) -> datasets.Dataset:
    """Check and convert rows that come with the place they are from."""
    import pyarrow as pa

    schema = _arrow_schema()
    parts: list[pa.Table] = []
    batch: dict[str, list[Any]] = {name: [] for name in _CANONICAL}
    names: Mapping[str, str] | None = None
    where = "the file"
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: expected an object with {', '.join(_CANONICAL)}, got {_show(row)}")
        if names is None:
            names = _resolve(list(row), columns, where)
        for name, value in zip(_CANONICAL, _check_row(row, names, where), strict=True):
            batch[name].append(value)
        if len(batch["query"]) == _ROWS_PER_BATCH:
            parts.append(pa.table(batch, schema=schema))
            batch = {name: [] for name in _CANONICAL}
    if batch["query"]:
        parts.append(pa.table(batch, schema=schema))
    return _as_dataset(parts, where)
