"""Scores of many queries' documents to rankings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rerank_fast.model.texts import check_documents_of, check_text, plain, shown


def check_lists(
    queries: Any, documents_per_query: Any, top_k: int | None
) -> tuple[list[str], list[list[str]]]:
    """The queries, and each one's documents, as lists of Python's strings.

    Raises:
        ValueError: there is not a list of documents for each query, a text is no string or not
            valid Unicode, or top_k is no number from 1; names the query and the document.
    """
    top_k = plain(top_k)
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be None or at least 1, got {top_k!r}")
    what = {"a list of queries": queries, "a list of documents a query": documents_per_query}
    for expected, values in what.items():
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
            raise ValueError(f"expected {expected}, got {shown(values)}")
    queries = [check_text(query, f"query {q}") for q, query in enumerate(queries)]
    lists = [check_documents_of(docs, f"query {q}") for q, docs in enumerate(documents_per_query)]
    if len(queries) != len(lists):
        raise ValueError(
            f"expected one list of documents for each query, got {len(queries)} queries and "
            f"{len(lists)} lists of documents"
        )
    return queries, [
        [check_text(document, f"query {q}, document {d}") for d, document in enumerate(docs)]
        for q, docs in enumerate(lists)
    ]


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
