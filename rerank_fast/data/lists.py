"""Ranking lists from wherever they are, each row checked, under one schema."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
)

from rerank_fast.data.layouts.parts import is_parts
from rerank_fast.data.layouts.row import Options
from rerank_fast.data.layouts.sources import read_lists
from rerank_fast.data.rows import Source, is_path, name_of, parse_address

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "query": Value("string"),
        "docs": List(Value("string")),
        "labels": List(Value("float32")),
    }
)
_HUB_URL = re.compile(r"hf://datasets/([^/@]+(?:/[^/@]+)?)@")


def load_lists(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    labels: Literal["relevance", "scores"] = "relevance",
) -> Dataset:
    """Ranking lists as a Dataset: query (string), docs (strings) and labels (float32s).

    What columns a row may have is in docs/data_layouts.md, and in the error where none fits; the
    log says which layout was taken. The rows of a query become one list, wherever they stand.

    Args:
        source: a .jsonl, .json, .csv, .tsv (each also .gz or .zst) or .parquet file; several of
            them or a glob; a directory written by `Dataset.save_to_disk`; a dataset of the hub, as
            NAME:CONFIG[SPLIT]; a `datasets.Dataset`; a table of pandas, polars or Arrow; a sequence
            of mappings. Or several parts: a folder as BEIR's, or a mapping with some of corpus,
            queries, qrels, run and lists, each of which is any of these.
        columns: where the source's columns have other names: {"query": ..., "docs": ...}, or of
            labels, document, label, scores, score, positive and negative.
        split: of a hub or saved dataset, or of a folder's files; "train" where it is left out.
        labels: what becomes the label where rows have both: "relevance", their labels, or 1 for a
            positive and 0 for a negative; or a teacher's "scores" as they are, for distillation.

    Raises:
        ValueError: the source can't be read, no layout fits, or a row is malformed: names the file
            and line (or row) and the field.
    """
    known = isinstance(source, Dataset) and source.features == FEATURES  # what this function gives
    say = logger.debug if known else logger.info
    rows = read_lists(source, Options(labels), columns=columns, split=split, say=say)
    return _collect(rows, _named(source))


class ListStream:
    """Lists that are read anew, one after the other, each time they are iterated.

    For more than memory holds. Gives {"query": str, "docs": [str], "labels": [float]}, checked as
    load_lists checks them. Where each document has a row of its own, a list is of rows that follow
    each other: rows of its query elsewhere are another list. Of parts, the texts of queries and
    corpus are in memory.

    Args:
        source: what load_lists takes, or a `datasets.IterableDataset`.
        columns: where the source's columns have other names.
        split: of a hub or saved dataset, or of a folder's files.
        labels: "relevance" or "scores"; see load_lists.

    Raises:
        ValueError: as load_lists; a malformed row is found when it is read.
    """

    def __init__(
        self,
        source: Source,
        *,
        columns: Mapping[str, str] | None = None,
        split: str | None = None,
        labels: Literal["relevance", "scores"] = "relevance",
    ) -> None:
        self.source, self.columns, self.split = source, columns, split
        self.options = Options(labels, consecutive=True)
        self._say = logger.info
        if next(iter(self), None) is None:
            raise ValueError(f"{_named(source)} holds no list")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        say, self._say = self._say, logger.debug  # once is enough
        columns, split = self.columns, self.split
        return read_lists(self.source, self.options, columns=columns, split=split, say=say)


def open_lists(source: Source | ListStream, *, streaming: bool = False) -> Dataset | ListStream:
    """A stream where one is given or asked for, else all lists; see load_lists."""
    if isinstance(source, ListStream):
        return source
    streaming = streaming or isinstance(source, IterableDataset)
    return ListStream(source) if streaming else load_lists(source)


def names_of(source: Source | ListStream) -> list[str]:
    """Where lists come from, as a reader would look for them: files, directories and hub ids.

    Of a dataset that is already open, what its info says of the hub; of lists in memory nothing.
    """
    if isinstance(source, ListStream):
        return names_of(source.source)
    if is_path(source):
        return [parse_address(os.fspath(source)).name]
    if isinstance(source, DatasetDict | IterableDatasetDict) or is_parts(source):
        return list(dict.fromkeys(name for part in source.values() for name in names_of(part)))
    if isinstance(source, Dataset | IterableDataset):
        info = source.info
        found = (_HUB_URL.match(url) for url in info.download_checksums or {})
        ids = dict.fromkeys(match[1] for match in found if match)
        # A file that `datasets` reads gives the dataset the name of its format, as in json.
        named = info.dataset_name is not None and info.dataset_name != info.builder_name
        return list(ids) or ([str(info.dataset_name)] if named else [])
    if isinstance(source, Mapping) or not isinstance(source, Sequence):
        return []
    return [name for item in source if is_path(item) for name in names_of(item)]


def _named(source: Source) -> str:
    return "the sequence of lists" if (name := name_of(source)) == "list" else name


def _collect(rows: Iterable[dict[str, Any]], where: str) -> Dataset:
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for row in rows:
        for name, values in columns.items():
            values.append(row[name])
    if not columns["query"]:
        raise ValueError(f"{where} holds no list")
    return Dataset.from_dict(columns, features=FEATURES)
