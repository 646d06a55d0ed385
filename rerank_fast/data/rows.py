"""Rows of whatever holds them, each with the place that an error names: file and line, or row."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_from_disk,
)

from rerank_fast.data.delimited import Headerless, delimited_rows
from rerank_fast.data.files import (
    LINE_SUFFIXES,
    TABLE_SUFFIXES,
    is_readable,
    json_values,
    open_parquet,
    python_rows,
    suffix_of,
    table_batches,
)
from rerank_fast.data.hub import load_hub_dataset
from rerank_fast.model.texts import one_line, plain, shown

# A path, a hub id, a dataset, rows, a table of pandas, polars or Arrow, or several paths.
Source: TypeAlias = Any
Placed: TypeAlias = tuple[str, Any]  # where it is, and what is there

KINDS = (
    "a .jsonl, .json, .csv, .tsv (each also .gz or .zst) or .parquet file, "
    "a directory written by Dataset.save_to_disk"
)
_BATCH = 1024
_ADDRESS = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:\[(.+)\])?")


@dataclass(frozen=True)
class Address:
    """What a name stands for: a file, a directory, or a dataset of the hub, and a part of it."""

    name: str
    config: str | None = None
    split: str | None = None


def parse_address(source: str, split: str | None = None) -> Address:
    """A path or NAME:CONFIG[SPLIT]; a directory may have a split too.

    Raises:
        ValueError: both the name and the caller give a split, and not the same; the name is empty.
    """
    if not source:  # of a shell's variable that is not set; as a path it is this directory
        raise ValueError("expected a path or a hub id, got ''")
    if os.path.exists(source):
        return Address(source, split=split)
    name, config, own = source, None, None
    if source.endswith("]") and os.path.isdir(source.partition("[")[0]):
        name, _, rest = source.partition("[")
        own = rest[:-1]
    elif match := _ADDRESS.fullmatch(source):
        name, config, own = match.groups()
    if own is not None and split not in (None, own):
        raise ValueError(f"{source} names the split {own!r}, but split is {split!r}")
    return Address(name, config, own or split)


def is_path(source: Any) -> bool:
    return isinstance(source, str | os.PathLike)


def paths_in(source: Any) -> list[str] | None:
    """The files, directories and hub ids of a source, globs resolved; None where it is no path.

    Raises:
        ValueError: no file matches a glob.
    """
    if is_path(source):
        return _matches(os.fspath(source))
    if isinstance(source, Sequence) and source and all(map(is_path, source)):
        return [path for item in source for path in _matches(os.fspath(item))]
    return None


def _matches(path: str) -> list[str]:
    if not glob.has_magic(path) or os.path.exists(path) or path.endswith("]"):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise ValueError(f"no file matches {path}")
    return found


def name_of(source: Source) -> str:
    """A source as an error or a log line names it."""
    if is_path(source):
        return os.fspath(source)
    if isinstance(source, Dataset | DatasetDict | IterableDataset | IterableDatasetDict):
        return "dataset"
    if isinstance(source, Mapping):
        return ", ".join(f"{part} {name_of(value)}" for part, value in source.items())
    if isinstance(source, Sequence) and source and all(map(is_path, source)):
        return ", ".join(map(str, source))
    return "list" if isinstance(source, Sequence) else f"{type(source).__name__}"


def no_names(cells: Sequence[str]) -> None:
    """For tables whose first line must name their columns."""


def read_rows(
    source: Source,
    *,
    split: str | None = None,
    headerless: Headerless = no_names,
) -> Iterator[Placed]:
    """Every row of a source, unchecked, with the place that an error names.

    Args:
        source: a file, a saved dataset, a hub id, several of them or a glob; a dataset; a table of
            pandas, polars or Arrow; a sequence of rows.
        split: of a hub or saved dataset; "train" where it is left out.
        headerless: names the columns of a .tsv file without a header by its first line's cells.

    Raises:
        ValueError: the source can't be read, or is none of these.
    """
    return (row for _, rows in read_items(source, split, headerless) for row in rows)


def read_items(
    source: Source, split: str | None = None, headerless: Headerless = no_names
) -> Iterator[tuple[str, Iterator[Placed]]]:
    """The rows of each file of a source and its name; see read_rows."""
    source = plain(source) if isinstance(source, np.ndarray) else source
    if isinstance(source, DatasetDict | IterableDatasetDict):
        source = _split_of(source, split, "the dataset")
    paths = paths_in(source)
    if paths is not None:
        return ((path, _open(path, split, headerless)) for path in paths)
    if isinstance(source, Dataset | IterableDataset):
        return iter([("dataset", _dataset_rows(source, "dataset"))])
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        return iter([("the sequence of lists", _placed(source, "list"))])
    name = type(source).__name__
    if hasattr(source, "itertuples"):
        return iter([(name, _placed(_pandas_rows(source), name))])
    if isinstance(source, pyarrow.RecordBatch):
        source = pyarrow.Table.from_batches([source])
    if hasattr(source, "__arrow_c_stream__"):
        return iter([(name, _arrow_rows(source, name))])
    raise ValueError(
        "expected a path, a dataset, a table, a sequence of rows or a mapping of corpus, queries, "
        f"qrels, run and lists, got {shown(source)}"
    )


def _split_of(parts: Mapping[Any, Any], split: str | None, name: str) -> Any:
    if (split or "train") not in parts:
        there = sorted(map(str, parts))
        raise ValueError(f"{name} has the splits {there}, not {split or 'train'!r}")
    return parts[split or "train"]


def _open(path: str, split: str | None, headerless: Headerless) -> Iterator[Placed]:
    address = parse_address(path, split)
    name, file = address.name, Path(address.name)
    if file.is_dir():
        return _saved_rows(name, address.split)
    if is_readable(file):
        if not file.is_file():
            raise ValueError(f"file {path} does not exist")
        if split is not None:
            raise ValueError(f"a file has no splits: got split={split!r} with {path}")
        return _file_rows(name, headerless)
    if file.exists() or path.startswith((".", "/", "~")) or not _ADDRESS.fullmatch(path):
        raise ValueError(f"expected {KINDS}, or a hub id, got {path}")
    dataset = load_hub_dataset(name, address.config, address.split or "train", layout=KINDS)
    return _dataset_rows(dataset, path)


def _file_rows(path: str, headerless: Headerless) -> Iterator[Placed]:
    suffix = suffix_of(path)
    if suffix in LINE_SUFFIXES:
        return json_values(path)
    if suffix in TABLE_SUFFIXES:
        return delimited_rows(path, headerless)
    return _parquet_rows(path)


def _saved_rows(path: str, split: str | None) -> Iterator[Placed]:
    try:
        saved = load_from_disk(path)
    except Exception as error:  # of as many kinds as there are parts of its files
        neither = "not a dataset written by save_to_disk, nor a folder with a corpus"
        raise ValueError(f"{path} is {neither}: {one_line(error)}") from error
    saved = _split_of(saved, split, path) if isinstance(saved, DatasetDict) else saved
    return _dataset_rows(saved, path)


def _parquet_rows(path: str) -> Iterator[Placed]:
    file = open_parquet(path)

    def rows() -> Iterator[dict[str, Any]]:
        with file:
            for first, batch in table_batches(file, path, batch_size=_BATCH):
                yield from python_rows(batch, path, first)

    return _placed(rows(), path)


def _dataset_rows(dataset: Dataset | IterableDataset, where: str) -> Iterator[Placed]:
    def rows() -> Iterator[dict[str, Any]]:
        read = 0
        try:
            for batch in dataset.with_format(None).iter(batch_size=_BATCH):
                for row in _transpose(batch):
                    read += 1
                    yield row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}, from row {read} on: damaged: {one_line(error)}") from error

    return _placed(rows(), where)


def _pandas_rows(frame: Any) -> Iterator[dict[str, Any]]:
    """What is missing is None, not pandas' NaN or NA."""
    names = list(map(str, frame.columns))
    frame = frame.astype(object).where(frame.notna(), None)
    return (dict(zip(names, row, strict=True)) for row in frame.itertuples(index=False, name=None))


def _arrow_rows(source: Any, where: str) -> Iterator[Placed]:
    def rows() -> Iterator[dict[str, Any]]:
        read = 0
        try:
            for batch in pyarrow.RecordBatchReader.from_stream(source):
                for start in range(0, batch.num_rows, _BATCH):
                    yield from python_rows(batch.slice(start, _BATCH), where, read + start)
                read += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{where}, from row {read} on: damaged: {one_line(error)}") from error

    return _placed(rows(), where)


def _placed(rows: Iterable[Any], where: str) -> Iterator[Placed]:
    return ((f"{where}, row {number}", row) for number, row in enumerate(rows))


def _transpose(batch: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
