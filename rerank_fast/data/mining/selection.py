"""Which of the retrieved documents become negatives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np


@dataclass
class Selection:
    """The options of mining that choose among candidates, in sentence-transformers' terms.

    Raises:
        ValueError: a value is out of its range; says which and what came.
    """

    num_negatives: int = 9
    range_min: int = 0
    range_max: int | None = None
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    sampling_strategy: Literal["top", "random"] = "top"
    seed: int = 12
    # Candidates, by the option that did it.
    skipped: Counter[str] = field(default_factory=Counter, compare=False)

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, got {self.num_negatives}")
        if self.range_min < 0:
            raise ValueError(f"range_min must be at least 0, got {self.range_min}")
        if self.range_max is not None and self.num_negatives > self.range_max - self.range_min:
            raise ValueError(
                f"range_max - range_min must leave num_negatives={self.num_negatives} candidates, "
                f"got range_min={self.range_min} and range_max={self.range_max}"
            )
        if self.sampling_strategy not in ("top", "random"):
            raise ValueError(
                f"sampling_strategy must be top or random, got {self.sampling_strategy!r}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        for name in ("max_score", "min_score", "absolute_margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "skipped"}

    def with_range(self, max_positives: int, *, rescored: bool) -> Selection:
        """This selection with a range_max: wide where candidates may be skipped or reordered, else
        just enough.
        """
        if self.range_max is not None:
            return self
        filters = (self.max_score, self.absolute_margin, self.relative_margin)
        many = rescored or any(value is not None for value in filters)
        wanted = self.num_negatives * (10 if many else 1)
        return replace(self, range_max=self.range_min + wanted + max_positives)

    def select(
        self,
        query: int,
        indices: np.ndarray,  # (C,) candidates, none of them a positive
        scores: np.ndarray,  # (C,) fp32
        positive_scores: np.ndarray,  # (P,) fp32
    ) -> np.ndarray:
        """(at most num_negatives,) places in indices, best first. The same for the same query
        number and seed.

        As in sentence-transformers the margins are measured from the lowest-scored positive, and
        range_min and range_max count the candidates that pass the filters.
        """
        keep = np.ones(len(indices), bool)
        lowest = positive_scores.min()
        if self.absolute_margin is not None:
            self._skip(keep, "absolute_margin", scores + np.float32(self.absolute_margin) > lowest)
        if self.relative_margin is not None:
            threshold = lowest - abs(lowest) * np.float32(self.relative_margin)
            self._skip(keep, "relative_margin", scores > threshold)
        if self.max_score is not None:
            self._skip(keep, "max_score", scores > np.float32(self.max_score))
        if self.min_score is not None:
            self._skip(keep, "min_score", scores < np.float32(self.min_score))
        places = np.flatnonzero(keep)
        order = places[np.argsort(-scores[places], kind="stable")][self.range_min : self.range_max]
        if self.sampling_strategy == "random" and len(order) > self.num_negatives:
            draw = np.random.default_rng([self.seed, query])
            return order[np.sort(draw.choice(len(order), self.num_negatives, replace=False))]
        return order[: self.num_negatives]

    def _skip(self, keep: np.ndarray, name: str, hit: np.ndarray) -> None:
        self.skipped[name] += int((keep & hit).sum())
        keep &= ~hit


def grade(
    labels: Literal["relevance", "teacher", "scores"],
    relevance: Sequence[float],  # (D,) the source's labels, 0 for negatives
    scores: np.ndarray,  # (D,) fp32
) -> list[float]:
    """(D,) labels of a list; see `mine_hard_negatives`."""
    if labels == "relevance":
        return list(relevance)
    if labels == "scores":
        # Shortest that reads back the same.
        return [float(str(score)) for score in scores.astype(np.float32)]
    spread = scores.max() - scores.min()
    if not spread > 0:  # the teacher tells nothing apart
        return [4.0 if label > 0 else 0.0 for label in relevance]
    return [
        round(float(value), 4) for value in 4 * (scores.astype(np.float64) - scores.min()) / spread
    ]
