"""Documents that tie in score: metrics expected over the orders of ties, and one such order."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np


class Ranking:
    """One list's ranks by descending (D,) scores; equal ones are a tie, each order of it as good.

    The attributes are (D,) arrays with a value for each rank.
    """

    def __init__(self, scores: np.ndarray) -> None:
        self.order = np.argsort(-scores, kind="stable")  # indices of documents
        ordered = scores[self.order]
        begins = np.ones(len(scores), dtype=bool)
        begins[1:] = ordered[1:] != ordered[:-1]
        self.tie = np.cumsum(begins) - 1
        self.sizes = np.bincount(self.tie)[self.tie]
        self.first = np.flatnonzero(begins)[self.tie]  # of the tie, from 0
        self.place = np.arange(len(scores)) - self.first  # within the tie, from 0

    def expected(self, values: np.ndarray) -> np.ndarray:
        """The value expected at each rank, (D,), from the documents' own: the mean of its tie."""
        sums = np.bincount(self.tie, weights=values[self.order])
        return sums[self.tie] / self.sizes


def count_preference_pairs(labels: np.ndarray, scores: np.ndarray) -> tuple[int, int]:
    """Pairs of a list's documents with different labels: those that tie in score, and all."""
    _, label = np.unique(labels, return_inverse=True)
    _, score = np.unique(scores, return_inverse=True)
    _, both = np.unique(label * len(scores) + score, return_inverse=True)
    same = [int((np.bincount(kind) ** 2).sum()) for kind in (label, score, both)]  # ordered pairs
    return (same[1] - same[2]) // 2, (len(scores) ** 2 - same[0]) // 2


def draw_order(scores: np.ndarray, *key: object) -> np.ndarray:
    """(D,) indices by descending score, ties in an order that the key alone decides."""
    generator = np.random.default_rng(zlib.crc32(repr(key).encode(errors="backslashreplace")))
    return np.lexsort((generator.random(len(scores)), -scores))


def exact_form(measure: Any) -> Callable[[Ranking, np.ndarray], float] | None:
    """Of a measure: its expected value as a function of a ranking and (D,) labels, if there is one.

    A document is relevant where its label is above 0, or at least rel where that is above 1.
    """
    k, level = measure.params.get("cutoff"), measure.params.get("rel", 1)
    form = _FORMS.get(measure.NAME)
    others = set(measure.params) - {"cutoff"} - ({"rel"} if measure.NAME != "nDCG" else set())
    if form is None or others or level < 1 or (k is not None and k < 1):
        return None
    if measure.NAME == "nDCG":
        return lambda ranking, labels: form(ranking, np.maximum(labels, 0), k)
    # 0.5 is relevant for rel 1: so it is where no rel is named.
    lowest = np.nextafter(0, 1) if level == 1 else level
    return lambda ranking, labels: form(ranking, (labels >= lowest).astype(float), k)


# Expected values over the orders of ties (McSherry and Najork, ECIR 2008), from the documents' (D,)
# gains, or 1 for a relevant one and 0 for another.


def _ndcg(ranking: Ranking, gains: np.ndarray, k: int | None) -> float:
    discounts = 1 / np.log2(np.arange(2, len(gains) + 2))[:k]
    ideal = np.sort(gains)[::-1][:k] @ discounts
    return float(ranking.expected(gains)[:k] @ discounts / ideal) if ideal > 0 else 0.0


def _precision(ranking: Ranking, relevant: np.ndarray, k: int) -> float:
    return float(ranking.expected(relevant)[:k].sum() / k)


def _recall(ranking: Ranking, relevant: np.ndarray, k: int) -> float:
    return float(ranking.expected(relevant)[:k].sum() / max(relevant.sum(), 1))


def _average_precision(ranking: Ranking, relevant: np.ndarray, k: int | None) -> float:
    chance = ranking.expected(relevant)
    above = np.concatenate([[0], np.cumsum(chance)])[ranking.first]
    # Where a document of a tie is relevant, this many of those in its tie's earlier places are.
    beside = ranking.place * (chance * ranking.sizes - 1) / np.maximum(ranking.sizes - 1, 1)
    precision = (above + beside + 1) / np.arange(1, len(relevant) + 1)
    return float((chance * precision)[:k].sum() / max(relevant.sum(), 1))


def _first_at(ranking: Ranking, relevant: np.ndarray) -> np.ndarray:
    """(D,) chances that a rank holds the first relevant document."""
    left = ranking.sizes - ranking.place
    # A rank's chance where no earlier one is relevant: 1 at the last that can be the first.
    here = np.minimum(ranking.expected(relevant) * ranking.sizes / left, 1)
    return here * np.concatenate([[1], np.cumprod(1 - here)[:-1]])


def _reciprocal_rank(ranking: Ranking, relevant: np.ndarray, k: int | None) -> float:
    return float((_first_at(ranking, relevant) / np.arange(1, len(relevant) + 1))[:k].sum())


def _success(ranking: Ranking, relevant: np.ndarray, k: int) -> float:
    return float(_first_at(ranking, relevant)[:k].sum())


_FORMS: dict[str, Callable[..., float]] = {
    "AP": _average_precision,
    "P": _precision,
    "R": _recall,
    "RR": _reciprocal_rank,
    "Success": _success,
    "nDCG": _ndcg,
}
