"""Documents of a batch's other lists as further negatives of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rerank_fast.data.held_out import normalized


def add_negatives(
    rows: Sequence[dict[str, Any]], count: int, seed: Sequence[int]
) -> tuple[list[dict[str, Any]], int]:
    """Every list with documents of the others, label 0 each, and how many were added in all.

    A document is taken once for a list, and neither where the list has it, nor where another list
    of the same query does; queries and texts are the same where `normalized` makes them so.
    Where the others have too few, a list gets those that there are.

    Args:
        rows: {"query": str, "docs": [str], "labels": [float]} of a global batch.
        count: documents for each list.
        seed: of the draw.
    """
    texts: dict[str, str] = {}  # each document of the batch by what it says
    own: dict[str, set[str]] = {}  # and what the lists of a query say
    keys = [normalized(row["query"]) for row in rows]
    for key, row in zip(keys, rows, strict=True):
        said = own.setdefault(key, set())
        for doc in row["docs"]:
            said.add(document := normalized(doc))
            texts.setdefault(document, doc)
    documents, draw = list(texts), np.random.default_rng(seed)
    longer, added = [], 0
    for key, row in zip(keys, rows, strict=True):
        order = (documents[i] for i in draw.permutation(len(documents)))
        others = (texts[document] for document in order if document not in own[key])
        drawn = [doc for _, doc in zip(range(count), others, strict=False)]
        added += len(drawn)
        docs, labels = [*row["docs"], *drawn], [*row["labels"], *[0.0] * len(drawn)]
        longer.append({**row, "docs": docs, "labels": labels})
    return longer, added
