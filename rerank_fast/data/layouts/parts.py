"""Sources of several parts: a folder, or a mapping of each part to where it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict, IterableDatasetDict

from rerank_fast.data.files import is_readable
from rerank_fast.data.rows import is_path, parse_address

# What a folder's files and subfolders are called, up to the first dot.
_NAMES = {
    "corpus": ("corpus", "collection", "passages", "documents"),
    "queries": ("queries", "topics"),
    "qrels": ("qrels",),
    "run": ("run", "bm25"),
    "lists": ("lists", "triples", "qidpidtriples", "hard-negatives", "msmarco-hard-negatives"),
}
PARTS = tuple(_NAMES)
_SPLITS = {"train", "dev", "test", "val", "validation"}
_SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")


def is_parts(source: Any) -> bool:
    """Whether a source is a mapping of parts."""
    if not isinstance(source, Mapping) or isinstance(source, DatasetDict | IterableDatasetDict):
        return False
    return bool(source) and set(source) <= set(PARTS)


def find_parts(source: Any, split: str | None = None) -> dict[str, Any] | None:
    """The parts of a source and where they are; None where it has none.

    Args:
        source: a mapping with some of corpus, queries, qrels, run and lists; or a folder with a
            corpus whose files or subfolders are called so, as BEIR's are.
        split: chooses among several files of a part, as qrels/train.tsv and qrels/test.tsv do;
            "train" where it is left out.

    Raises:
        ValueError: of a part's files none is of the split, or a mapping is given one.
    """
    if is_parts(source):
        if split is not None:
            raise ValueError(f"each part names its split, NAME:CONFIG[SPLIT], got split={split!r}")
        return dict(source)
    if not is_path(source):
        return None
    address = parse_address(os.fspath(source), split)
    folder = Path(address.name)
    if not folder.is_dir() or any((folder / name).exists() for name in _SAVED):
        return None
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        stem = entry.name.lower().partition(".")[0]
        part = next((part for part, names in _NAMES.items() if stem in names), None)
        if part is not None:
            files = sorted(entry.iterdir()) if entry.is_dir() else [entry]
            found.setdefault(part, []).extend(files)
    if "corpus" not in found:
        return None
    chosen = {part: _chosen(part, files, address.split or "train") for part, files in found.items()}
    return {part: chosen[part] for part in PARTS if chosen.get(part)} or None


def _chosen(part: str, files: Sequence[Path], split: str) -> list[str]:
    """Of a part's files that of the split; all of them where their names tell of none."""
    of_trec = part in ("qrels", "run")
    files = [file for file in files if file.is_file() and (of_trec or is_readable(file))]
    names = {file: set(file.name.replace("-", ".").split(".")) for file in files}
    of_split = [file for file in files if split in names[file]]
    others = sorted(file.name for file in files if not names[file].isdisjoint(_SPLITS))
    if others and not of_split and part != "corpus":
        raise ValueError(
            f"{files[0].parent} has {', '.join(others)}, and nothing of the split {split!r}; "
            "split=... or FOLDER[...] names another"
        )
    return [str(file) for file in of_split or files]
