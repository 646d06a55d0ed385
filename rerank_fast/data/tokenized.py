"""Lists as token ids: what the training step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rerank_fast.model.texts import check_labels
from rerank_fast.model.tokens.packing import TokenizedPairs

if TYPE_CHECKING:
    from rerank_fast.model.cross_encoder import CrossEncoder


@dataclass(frozen=True)
class TokenizedLists:
    """Q lists of N pairs in all; list q holds the pairs list_offsets[q] to list_offsets[q + 1]."""

    pairs: TokenizedPairs
    list_offsets: np.ndarray  # (Q + 1,) int64
    labels: np.ndarray  # (N,) float32
    truncated: int = (
        0  # pairs that were longer than the model takes; known of what tokenize_lists gives
    )

    def __len__(self) -> int:
        return len(self.list_offsets) - 1

    def select(self, lists: np.ndarray) -> TokenizedLists:
        """The lists at the given (M,) indices, in that order."""
        sizes = np.diff(self.list_offsets)[lists]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        flat = np.repeat(self.list_offsets[lists] - offsets[:-1], sizes) + np.arange(offsets[-1])
        return TokenizedLists(self.pairs.select(flat), offsets, self.labels[flat])

    def split(self, parts: int) -> list[TokenizedLists]:
        """The lists in at most this many parts of nearly equal number, in order; empty parts are
        left out.
        """
        cuts = np.array_split(np.arange(len(self)), parts)
        return [self] if parts == 1 else [self.select(cut) for cut in cuts if len(cut)]


def tokenize_lists(lists: Sequence[Any], model: CrossEncoder) -> TokenizedLists:
    """Tokenise every (query, document) pair of lists as `load_lists` and `ListStream` give them.

    Raises:
        ValueError: a list's labels are no numbers or not one for each document, or a text is no
            string.
    """
    labels = [check_labels(one["labels"], f"list {i}, labels") for i, one in enumerate(lists)]
    sizes = [len(one["docs"]) for one in lists]
    for i, (values, size) in enumerate(zip(labels, sizes, strict=True)):
        if len(values) != size:
            raise ValueError(f"list {i}: {size} documents but {len(values)} labels")
    pairs = [(one["query"], doc) for one in lists for doc in one["docs"]]
    tokens, truncated = model.tokenize_counting(pairs)
    return TokenizedLists(
        tokens,
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        np.asarray([label for values in labels for label in values], dtype=np.float32),
        truncated,
    )
