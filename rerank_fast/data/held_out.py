"""Lists set aside before training, query by query: none is trained on in another spelling."""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections.abc import Iterable

import numpy as np
from datasets import Dataset

logger = logging.getLogger(__name__)


def normalized(text: str) -> str:
    """A text without what its spelling alone decides: Unicode form (NFKC), case and whitespace."""
    # Folding the case can bring up characters that NFKC takes apart.
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def query_keys(queries: Iterable[str]) -> np.ndarray:
    """(Q,) uint64, equal where queries are equal but for their spelling: eight bytes a query."""
    digests = (hashlib.blake2b(normalized(query).encode(), digest_size=8) for query in queries)
    return np.fromiter((int.from_bytes(one.digest(), "big") for one in digests), np.uint64)


def queries_of(lists: Dataset) -> Iterable[str]:
    """The queries of lists in order, without their documents, some of them in memory at a time."""
    columns = lists.select_columns("query").with_format(None).iter(batch_size=1024)
    return (query for batch in columns for query in batch["query"])


def hold_out(lists: Dataset, count: int, *, seed: int) -> tuple[Dataset, Dataset]:
    """Set lists aside, query by query in an order drawn with the seed.

    Every list of a query that is drawn leaves the training set. What the last one drawn has beyond
    the count is in neither set.

    Args:
        lists: with a column query; a query may have several, spelled in several ways.
        count: lists to set aside, at least 1.
        seed: of the draw.

    Returns:
        (training lists, held-out lists), each in the order of lists; views, not copies.

    Raises:
        ValueError: there are not more lists than that, or no other query would be left to train on.
    """
    if count >= len(lists):
        raise ValueError(f"held_out is {count}, but there are {len(lists)} lists in all")
    keys = query_keys(queries_of(lists))
    distinct, query = np.unique(keys, return_inverse=True)
    turn = np.random.default_rng(seed).permutation(len(distinct))[query]  # (L,) of a list's query
    held = np.argsort(turn, kind="stable")[:count]
    last = turn[held[-1]]
    kept = np.flatnonzero(turn > last)
    if not len(kept):
        raise ValueError(
            f"held_out is {count}, but the {len(lists)} lists are of {len(distinct)} queries in "
            "all (but for case, spacing and Unicode form): setting that many aside leaves none "
            "to train on"
        )
    assert not len(np.intersect1d(keys[kept], keys[held]))
    logger.info(
        "%d lists of %d queries to train on; %d lists of %d other queries held out, drawn with "
        "seed %d; %d more lists of those are in neither",
        len(kept),
        len(distinct) - last - 1,
        count,
        last + 1,
        seed,
        len(lists) - len(kept) - count,
    )
    return lists.select(kept), lists.select(np.sort(held))
