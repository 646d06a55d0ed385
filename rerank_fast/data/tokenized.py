"""Lists as token ids: what the training step reads, made once before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from rerank_fast.model.packing import TokenizedPairs

if TYPE_CHECKING:
    from rerank_fast.model.cross_encoder import CrossEncoder


@dataclass(frozen=True)
class TokenizedLists:
    """Q lists of N pairs in all; list q holds the pairs list_offsets[q] to list_offsets[q + 1]."""

    pairs: TokenizedPairs
    list_offsets: np.ndarray  # (Q + 1,) int64
    labels: np.ndarray  # (N,) float32

    def __len__(self) -> int:
        return len(self.list_offsets) - 1

    def select(self, lists: np.ndarray) -> TokenizedLists:
        """The lists at the given (M,) indices, in that order."""
        sizes = np.diff(self.list_offsets)[lists]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        flat = np.repeat(self.list_offsets[lists] - offsets[:-1], sizes) + np.arange(offsets[-1])
        return TokenizedLists(self.pairs.select(flat), offsets, self.labels[flat])


def tokenize_lists(lists: Dataset, model: CrossEncoder, *, show_progress_bar: bool = False) -> TokenizedLists:
    """Tokenise every (query, document) pair of lists as `load_lists` gives them."""
    queries, documents, labels = lists["query"], lists["docs"], lists["labels"]
    pairs = [(query, doc) for query, docs in zip(queries, documents, strict=True) for doc in docs]
    sizes = [len(docs) for docs in documents]
    return TokenizedLists(
        model.tokenize(pairs, show_progress_bar=show_progress_bar),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        np.asarray([label for values in labels for label in values], dtype=np.float32),
    )
