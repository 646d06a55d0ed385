"""Scores of many queries' documents to rankings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def check_lists(queries: Sequence[str], documents_per_query: Sequence[Sequence[str]], top_k: int | None) -> None:
    """ValueError where there is not a list of documents for each query, or top_k is below 1."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be None or at least 1, got {top_k}")
    if isinstance(queries, str) or len(queries) != len(documents_per_query):
        raise ValueError(
            f"expected a list of queries and one list of documents for each, got "
            f"{'a string' if isinstance(queries, str) else f'{len(queries)} queries'} "
            f"and {len(documents_per_query)} lists of documents"
        )
    for index, documents in enumerate(documents_per_query):
        if isinstance(documents, str):
            raise ValueError(f"query {index}: expected a list of documents, got a string")


def rankings(
    all_scores: np.ndarray,  # (N,), query after query
    documents_per_query: Sequence[Sequence[str]],
    top_k: int | None,
    return_documents: bool,
) -> list[list[dict[str, Any]]]:
    """As CrossEncoder.rank returns them: descending scores, ties in input order."""
    ends = np.cumsum([len(documents) for documents in documents_per_query], dtype=np.int64)
    ranked = []
    for documents, scores in zip(documents_per_query, np.split(all_scores, ends[:-1]), strict=True):
        ranking = []
        for index in np.argsort(-scores, kind="stable")[:top_k].tolist():
            entry: dict[str, Any] = {"corpus_id": index, "score": float(scores[index])}
            if return_documents:
                entry["text"] = documents[index]
            ranking.append(entry)
        ranked.append(ranking)
    return ranked
