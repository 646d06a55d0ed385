"""What an evaluator scores: each query's documents, from lists or from sentence-transformers'
samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDatasetDict

from rerank_fast.data.layouts.parts import is_parts
from rerank_fast.data.lists import load_lists
from rerank_fast.model.texts import check_text, plain, shown


@dataclass(frozen=True)
class Candidates:
    """One query, the documents to score for it, and the first stage's order where there was one."""

    query_id: str
    query: str
    docs: Sequence[str]
    doc_ids: Sequence[str]
    labels: np.ndarray  # (D,) of docs
    base_labels: np.ndarray | None  # (B,) in the first stage's order


def load_candidates(source: Any, *, always_rerank_positives: bool = True) -> list[Candidates]:
    """Candidates from whatever `load_lists` takes, or from sentence-transformers' samples.

    A sample is {"query", "positive", "documents"} with the first stage's ranking in documents, or
    {"query", "positive", "negative"} without one; rows of samples come as a sequence, a Dataset or
    a mapping's values.

    Raises:
        ValueError: a list or sample is malformed; names it and what it has.
    """
    splits_or_parts = isinstance(source, DatasetDict | IterableDatasetDict) or is_parts(source)
    if isinstance(source, Mapping) and not splits_or_parts:
        source = list(source.values())
    source = plain(source) if isinstance(source, np.ndarray) else source
    if _holds_samples(source):
        return [_from_sample(row, i, always_rerank_positives) for i, row in enumerate(source)]
    lists = load_lists(source)
    candidates = []
    for q, (query, docs, values) in enumerate(
        zip(lists["query"], lists["docs"], lists["labels"], strict=True)
    ):
        labels = np.asarray(values)
        candidates.append(
            Candidates(str(q), query, docs, [f"d{i}" for i in range(len(docs))], labels, labels)
        )
    return candidates


def rank_candidates(
    query_id: str,
    query: str,
    positive: Mapping[str, str],
    documents: Mapping[str, str],
    *,
    always_rerank_positives: bool,
) -> Candidates:
    """Candidates of one query from its relevant documents and a first stage's ranking, both {id:
    text}.

    As in sentence-transformers a document is relevant where its text is that of a positive one; the
    base ranking ends with the positives that the first stage missed, and counts 0 where it missed
    all of them.
    """
    texts = set(positive.values())
    found = [float(text in texts) for text in documents.values()]
    missed = [1.0] * (len(positive) - int(sum(found))) if any(found) else []
    docs, labels = documents, found
    if always_rerank_positives:
        others = {key: text for key, text in documents.items() if text not in texts}
        docs = {**positive, **others}
        labels = [1.0] * len(positive) + [0.0] * len(others)
    return Candidates(
        query_id,
        query,
        list(docs.values()),
        list(docs),
        np.asarray(labels),
        np.asarray([*found, *missed]),
    )


def _holds_samples(source: Any) -> bool:
    if isinstance(source, Dataset):
        columns: Any = source.column_names
    else:
        columns = source[0] if isinstance(source, Sequence) and source else None
    if not isinstance(columns, Mapping | list) or "negative_1" in columns:  # a layout of lists
        return False
    return "positive" in columns or "negative" in columns


def _from_sample(row: Any, index: int, always_rerank_positives: bool) -> Candidates:
    place = f"sample {index}"
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{place}: expected query, positive and documents or negative, got {shown(row)}"
        )
    missing = [key for key in ("query", "positive") if key not in row]
    # A Dataset fills what one row lacks with None.
    others = [key for key in ("documents", "negative") if row.get(key) is not None]
    if missing or len(others) != 1:
        raise ValueError(
            f"{place}: expected query, positive and either documents or negative; there are "
            f"{sorted(map(str, row))}"
        )
    query = check_text(row["query"], f"{place}, field query", allow_empty=False)
    positive = plain(row["positive"])
    positive = [positive] if isinstance(positive, str) else positive
    relevant = _texts_by_id(positive, "p", f"{place}, field positive")
    rest = plain(row[others[0]])
    rest = [rest] if isinstance(rest, str) and others[0] == "negative" else rest
    rest = _texts_by_id(rest, "d", f"{place}, field {others[0]}")
    if others[0] == "documents":
        return rank_candidates(
            str(index), query, relevant, rest, always_rerank_positives=always_rerank_positives
        )
    docs = {**relevant, **rest}
    if not docs:
        raise ValueError(f"{place}: no documents")
    labels = np.asarray([1.0] * len(relevant) + [0.0] * len(rest))
    return Candidates(str(index), query, list(docs.values()), list(docs), labels, None)


def _texts_by_id(values: Any, letter: str, place: str) -> dict[str, str]:
    values = plain(values)
    if not isinstance(values, list | tuple):
        raise ValueError(f"{place}: expected a list of strings, got {shown(values)}")
    return {f"{letter}{i}": check_text(text, f"{place}[{i}]") for i, text in enumerate(values)}
