"""Ranking lists from JSONL, Parquet, datasets and the hub, each row checked, under one schema."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_from_disk,
)

from rerank_fast.data.files import (
    LINE_SUFFIXES,
    numbered_lines,
    open_parquet,
    parse_line,
    python_rows,
    table_batches,
)
from rerank_fast.data.hub import load_hub_dataset
from rerank_fast.model.texts import check_text, one_line, plain, shown

FEATURES = Features({"query": Value("string"), "docs": List(Value("string")), "labels": List(Value("float32"))})
# sentence-transformers takes any of these as the label column.
_ALIASES = {"query": ("query",), "docs": ("docs",), "labels": ("labels", "label", "scores", "score")}
_FLOAT32_MAX = 3.4028234663852886e38
_HUB_URL = re.compile(r"hf://datasets/([^/@]+(?:/[^/@]+)?)@")

Source: TypeAlias = str | os.PathLike[str] | Dataset | IterableDataset | Sequence[Any]


def load_lists(source: Source, *, columns: Mapping[str, str] | None = None, split: str | None = None) -> Dataset:
    """Ranking lists as a Dataset with the columns query (string), docs (strings) and labels (float32s).

    Args:
        source: a .jsonl or .parquet file, several of them, a directory written by `Dataset.save_to_disk`, a
            `datasets.Dataset`, a sequence of {"query", "docs", "labels"} mappings, or a dataset id on the hub.
        columns: where the source's columns have other names: {"query": ..., "docs": ..., "labels": ...}.
            Labels are also found as label, scores or score.
        split: of a hub or saved dataset; "train" where it is left out.

    Raises:
        ValueError: the source can't be read, a column is missing, or a row is malformed: names the file and
            line (or row) and the field.
    """
    return _collect(_rows(source, columns, split), _name(source))


class ListStream:
    """Lists that are read anew, one after the other, each time they are iterated: for more than memory holds.

    Gives {"query": str, "docs": [str], "labels": [float]}, checked as load_lists checks them.

    Args:
        source: what load_lists takes, or a `datasets.IterableDataset`.
        columns: where the source's columns have other names.
        split: of a hub or saved dataset.

    Raises:
        ValueError: as load_lists; a malformed row is found when it is read.
    """

    def __init__(
        self, source: Source, *, columns: Mapping[str, str] | None = None, split: str | None = None
    ) -> None:
        self.source, self.columns, self.split = source, columns, split
        if next(iter(self), None) is None:
            raise ValueError(f"{_name(source)} holds no list")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return _rows(self.source, self.columns, self.split)


def open_lists(source: Source | ListStream, *, streaming: bool = False) -> Dataset | ListStream:
    """A stream where one is given or asked for, else all lists; see load_lists."""
    if isinstance(source, ListStream):
        return source
    return ListStream(source) if streaming or isinstance(source, IterableDataset) else load_lists(source)


def names_of(source: Source | ListStream) -> list[str]:
    """Where lists come from, as a reader would look for them: files, directories and hub ids.

    Of a dataset that is already open, what its info says of the hub; empty for lists made in memory.
    """
    if isinstance(source, ListStream):
        return names_of(source.source)
    if isinstance(source, str | os.PathLike):
        return [os.fspath(source)]
    if isinstance(source, DatasetDict | IterableDatasetDict):
        return list(dict.fromkeys(name for part in source.values() for name in names_of(part)))
    if isinstance(source, Dataset | IterableDataset):
        info = source.info
        found = (_HUB_URL.match(url) for url in info.download_checksums or {})
        ids = dict.fromkeys(match[1] for match in found if match)
        # A file that `datasets` reads gives the dataset the name of its format, as in json.
        named = info.dataset_name is not None and info.dataset_name != info.builder_name
        return list(ids) or ([str(info.dataset_name)] if named else [])
    if isinstance(source, Mapping):
        return []
    return [os.fspath(item) for item in source if isinstance(item, str | os.PathLike)]


def _rows(source: Source, columns: Mapping[str, str] | None, split: str | None) -> Iterator[dict[str, Any]]:
    """Checked rows of a source, read as they are asked for."""
    for name in columns or {}:
        if name not in _ALIASES:
            raise ValueError(f"columns maps query, docs and labels to the source's names, got the key {name!r}")
    return _checked(read_rows(source, split=split), columns)


def read_rows(source: Source, *, split: str | None = None) -> Iterator[tuple[str, Any]]:
    """Every row of whatever `load_lists` takes, unchecked, with the place that an error names: file and line.

    Raises:
        ValueError: the source can't be read, or is none of these.
    """
    source = plain(source) if isinstance(source, np.ndarray) else source
    if isinstance(source, DatasetDict | IterableDatasetDict):
        if (split or "train") not in source:
            raise ValueError(f"the dataset has the splits {sorted(map(str, source))}, not {split or 'train'!r}")
        source = source[split or "train"]
    if isinstance(source, Dataset | IterableDataset):
        return _dataset_rows(source, "dataset")
    if isinstance(source, str | os.PathLike):
        return _open(os.fspath(source), split)
    if isinstance(source, Sequence) and source and all(isinstance(item, str | os.PathLike) for item in source):
        return (row for item in source for row in _open(os.fspath(item), split))
    if isinstance(source, Sequence):
        return _placed(source, "list")
    raise ValueError(f"expected a path, a dataset or a sequence of lists, got {shown(source)}")


def _name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Dataset | DatasetDict | IterableDataset | IterableDatasetDict):
        return "dataset"
    if len(source) and all(isinstance(item, str | os.PathLike) for item in source):
        return ", ".join(map(str, source))
    return "the sequence of lists"


def _collect(rows: Iterable[dict[str, Any]], where: str) -> Dataset:
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for row in rows:
        for name, values in columns.items():
            values.append(row[name])
    if not columns["query"]:
        raise ValueError(f"{where} holds no list")
    return Dataset.from_dict(columns, features=FEATURES)


def _open(path: str, split: str | None) -> Iterator[tuple[str, Any]]:
    file = Path(path)
    if split is not None and file.is_file():
        raise ValueError(f"a file has no splits: got split={split!r} with {path}")
    if file.is_dir():
        try:
            saved = load_from_disk(path)
        except Exception as error:  # of as many kinds as there are parts of its files
            said = f"{path} is not a dataset written by save_to_disk: {one_line(error)}"
            raise ValueError(said) from error
        if isinstance(saved, DatasetDict):
            name = split or "train"
            if name not in saved:
                raise ValueError(f"{path} has the splits {sorted(map(str, saved))}, not {name!r}")
            saved = saved[name]
        return _dataset_rows(saved, path)
    if file.suffix in LINE_SUFFIXES or file.suffix == ".parquet":
        if not file.is_file():
            raise ValueError(f"file {path} does not exist")
        return _parquet_rows(path) if file.suffix == ".parquet" else _json_lines(path)
    if file.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"expected a .jsonl or .parquet file, a saved dataset's directory or a hub id, got {path}")
    layout = "a .jsonl or .parquet file, or a directory written by Dataset.save_to_disk"
    return _dataset_rows(load_hub_dataset(path, None, split or "train", layout=layout), path)


def _json_lines(path: str) -> Iterator[tuple[str, Any]]:
    for number, line in numbered_lines(path):
        yield f"{path}, line {number}", parse_line(path, number, line)


def _parquet_rows(path: str) -> Iterator[tuple[str, Any]]:
    file = open_parquet(path)

    def rows() -> Iterator[dict[str, Any]]:
        with file:
            for first, batch in table_batches(file, path, batch_size=1024):
                yield from python_rows(batch, path, first)

    return _placed(rows(), path)


def _dataset_rows(dataset: Dataset | IterableDataset, where: str) -> Iterator[tuple[str, Any]]:
    def rows() -> Iterator[dict[str, Any]]:
        read = 0
        try:
            for batch in dataset.with_format(None).iter(batch_size=1024):
                for row in _transpose(batch):
                    read += 1
                    yield row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}, from row {read} on: damaged: {one_line(error)}") from error

    return _placed(rows(), where)


def _placed(rows: Iterable[Any], where: str) -> Iterator[tuple[str, Any]]:
    return ((f"{where}, row {number}", row) for number, row in enumerate(rows))


def _transpose(batch: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _checked(rows: Iterable[tuple[str, Any]], columns: Mapping[str, str] | None) -> Iterator[dict[str, Any]]:
    names: dict[str, str] | None = None
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{place}: expected an object with query, docs and labels, got {shown(row)}")
        if names is None or any(name not in row for name in names.values()):
            names = _column_names(row, place, columns)
        query, docs, labels = (row[names[field]] for field in ("query", "docs", "labels"))
        yield {
            "query": check_text(query, f"{place}, field {names['query']}", allow_empty=False),
            **check_documents(docs, labels, place, names),
        }


def _column_names(row: Mapping[str, Any], place: str, columns: Mapping[str, str] | None) -> dict[str, str]:
    names = {}
    for field, aliases in _ALIASES.items():
        candidates = (columns[field],) if columns and field in columns else aliases
        found = next((name for name in candidates if name in row), None)
        if found is None:
            raise ValueError(
                f"{place}: no column {' or '.join(candidates)} for the {field}; there are {sorted(map(str, row))}"
            )
        names[field] = found
    return names


def check_documents(docs: Any, labels: Any, place: str, names: Mapping[str, str]) -> dict[str, list[Any]]:
    docs, labels = plain(docs), plain(labels)
    for field, values in (("docs", docs), ("labels", labels)):
        if not isinstance(values, list | tuple):
            raise ValueError(f"{place}, field {names[field]}: expected a list, got {shown(values)}")
    if not docs:
        raise ValueError(f"{place}, field {names['docs']}: no documents")
    if len(docs) != len(labels):
        raise ValueError(
            f"{place}: {len(docs)} documents in {names['docs']} but {len(labels)} labels in {names['labels']}"
        )
    texts = [check_text(doc, f"{place}, field {names['docs']}[{i}]") for i, doc in enumerate(docs)]
    labels = [plain(label) for label in labels]
    for i, label in enumerate(labels):
        if not isinstance(label, int | float) or not abs(label) <= _FLOAT32_MAX:  # NaN too
            raise ValueError(f"{place}, field {names['labels']}[{i}]: expected a finite float32, got {label!r:.40}")
    return {"docs": texts, "labels": [float(label) for label in labels]}
