"""BM25 through bm25s."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from rerank_fast.data.mining.retrieval import Found

_BLOCK = 16  # documents whose best score stands for them in the first look at a query's scores


class BM25Retriever:
    """BM25 (Lucene's variant): finds the documents that share a term with the query.

    Args:
        k1: saturation of a term's frequency.
        b: normalisation by the document's length, 0 to 1.
        stopwords: terms to leave out: "en", None for none, another of bm25s's languages or a list.

    Raises:
        ValueError: bm25s is not installed.
    """

    def __init__(
        self, *, k1: float = 1.5, b: float = 0.75, stopwords: str | Sequence[str] | None = "en"
    ) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ValueError(
                "mining with BM25 needs bm25s: pip install 'rerank-fast[mine]'"
            ) from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets its own logger to DEBUG
        self.k1, self.b = k1, b
        self.stopwords = list(stopwords) if not isinstance(stopwords, str | None) else stopwords
        self._bm25 = bm25s.BM25(k1=k1, b=b)

    def settings(self) -> dict[str, Any]:
        return {"retriever": "bm25", "k1": self.k1, "b": self.b, "stopwords": self.stopwords}

    def index(
        self, corpus: Sequence[str], queries: Sequence[str], *, show_progress_bar: bool
    ) -> None:
        tokens = self._tokenize(corpus, show_progress_bar)
        if not tokens.vocab:
            raise ValueError(f"none of the {len(corpus)} documents has a term: BM25 can't find any")
        self._bm25.index(tokens, show_progress=show_progress_bar)
        found = self._tokenize(queries, show_progress_bar)
        # Query terms by the corpus's numbers; a term that no document has drops out.
        terms = [tokens.vocab.get(term) for term in found.vocab]
        self._queries = [[terms[i] for i in ids if terms[i] is not None] for ids in found.ids]

    def _tokenize(self, texts: Sequence[str], show_progress_bar: bool) -> Any:
        import bm25s

        return bm25s.tokenize(
            list(texts), stopwords=self.stopwords or [], show_progress=show_progress_bar
        )

    def search(self, start: int, stop: int, k: int, positives: Sequence[Sequence[int]]) -> Found:
        indices = np.full((stop - start, k), -1, np.int64)
        best = np.full((stop - start, k), -np.inf, np.float32)
        positive_scores = []
        for row, (terms, relevant) in enumerate(
            zip(self._queries[start:stop], positives, strict=True)
        ):
            scores = self._bm25.get_scores_from_ids(terms)  # (N,) fp32
            found = _top_k(scores, k)
            indices[row, : len(found)] = found
            best[row, : len(found)] = scores[found]
            positive_scores.append(scores[list(relevant)])
        return Found(indices, best, positive_scores)


def _top_k(
    scores: np.ndarray,  # (N,), none negative
    k: int,
) -> np.ndarray:
    """(at most k,) indices of the highest scores above 0, descending, ties by index."""
    # k blocks whose best is at least t hold k scores of at least t: nearly all documents go with
    # one comparison.
    starts = np.arange(0, len(scores), _BLOCK)
    bests = np.maximum.reduceat(scores, starts)
    threshold = np.partition(bests, len(bests) - k)[len(bests) - k] if k < len(bests) else 0.0
    found = np.flatnonzero((scores >= threshold) & (scores > 0))
    if len(found) > k:
        best = scores[found]
        # Those tied at the end too.
        found = found[best >= np.partition(best, len(best) - k)[len(best) - k]]
    return found[np.argsort(-scores[found], kind="stable")[:k]]
