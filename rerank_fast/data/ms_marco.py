"""MS MARCO v1.1 rows as ranking lists: a query's passages, relevant where is_selected says so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from rerank_fast.data.hub import load_hub_dataset, read_columns
from rerank_fast.data.lists import load_lists

logger = logging.getLogger(__name__)


def load_ms_marco(source: str | Path = "microsoft/ms_marco", *, split: str = "train") -> Dataset:
    """Lists of MS MARCO v1.1: queries with a selected passage, labels from is_selected, passages in
    their order.

    Args:
        source: the hub id; or a local copy with the hub's columns (query, passages.passage_text,
            passages.is_selected): a .parquet or .jsonl file, or a directory that holds
            v1.1/SPLIT-*.parquet (what downloading the hub dataset gives) or SPLIT.parquet or
            SPLIT.jsonl.

    Raises:
        ValueError: the source can't be read, lacks a column, or no query of it has a selected
            passage.
    """
    where = f"{source}, {split}"
    path = Path(source)
    rows: Any = [path] if path.is_file() else _files(path, split) if path.is_dir() else None
    if rows is None:
        dataset = load_hub_dataset(
            str(source), "v1.1", split, layout=f"a directory with v1.1/{split}-*.parquet"
        )
        rows = dataset.with_format("arrow")[:]
    columns = read_columns(rows, ("query", "passages"), where)
    lists = []
    for i, (query, passages) in enumerate(zip(columns["query"], columns["passages"], strict=True)):
        passages = {} if passages is None else passages
        if not isinstance(passages, Mapping):
            raise ValueError(f"{where}, row {i}: passages must be an object, got {passages!r:.60}")
        missing = {"passage_text", "is_selected"} - set(passages)
        if missing:
            raise ValueError(
                f"{where}, row {i}: passages lacks {sorted(missing)}; there are {sorted(passages)}"
            )
        if not isinstance(passages["is_selected"], list):
            got = f"{passages['is_selected']!r:.60}"
            raise ValueError(f"{where}, row {i}: is_selected must be a list, got {got}")
        if any(passages["is_selected"]):
            lists.append(
                {
                    "query": query,
                    "docs": passages["passage_text"],
                    "labels": passages["is_selected"],
                }
            )
    logger.info(
        "%s: %d of %d queries have a selected passage", where, len(lists), len(columns["query"])
    )
    if not lists:
        raise ValueError(f"{where}: none of {len(columns['query'])} queries has a selected passage")
    return load_lists(lists)


def _files(directory: Path, split: str) -> list[Path]:
    for pattern in (f"v1.1/{split}-*.parquet", f"{split}.parquet", f"{split}.jsonl"):
        if files := sorted(directory.glob(pattern)):
            return files
    there = sorted(
        str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()
    )[:20]
    raise ValueError(
        f"{directory} has no v1.1/{split}-*.parquet, {split}.parquet or {split}.jsonl; there are "
        f"{there}"
    )
