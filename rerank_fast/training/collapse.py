"""Whether a run's model still tells documents apart: the commonest way in which training a reranker
fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rerank_fast.ops import ragged

_LINES = 3  # that a collapse has to last: a fresh head's scores lie close together too
_EVALUATIONS = 2  # and how often the model has to be measured as worse than what was there
_SATURATED = 17.0  # from here on a sigmoid is 1 in fp32


def spread_of_lists(
    scores: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
    rounding: float,
) -> Tensor:
    """(4,) fp32 on the scores' device: over the lists of two documents and more, the sum of their
    scores' ranges, the number of those whose range is rounding, and the number of all; last, the
    sum of the scores' means.

    Args:
        scores: of whole lists.
        offsets: of the lists.
        rounding: relative, of the dtype that the scores were computed in.
    """
    num_lists = offsets.shape[0] - 1
    group = ragged.lists_of(offsets, scores.shape[0])
    scores = scores.float()
    ends = [
        scores.new_zeros(num_lists).scatter_reduce(0, group, scores, kind, include_self=False)
        for kind in ("amax", "amin", "mean")
    ]
    highest, lowest, mean = ends
    several = offsets.diff() > 1
    spread = highest - lowest
    tied = spread <= rounding * torch.maximum(highest.abs(), lowest.abs()).clamp(min=1)
    return torch.stack(
        [one.where(several, 0).sum() for one in (spread, tied.float(), several.float(), mean)]
    )


class CollapseGuard:
    """Told what a run logs and measures, it says once that the model has collapsed, and what may
    have done it.

    Collapsed is a model whose scores within most lists differ by no more than rounding in several
    log lines running, or that is measured as worse than the first stage's order, or than itself
    untrained, in several evaluations running, the last of which gained nothing.

    Args:
        metric: that chooses the best model.
        activation: of the model's predictions.
        learning_rate: the schedule's peak.
    """

    def __init__(self, metric: str, activation: object, learning_rate: float) -> None:
        self.metric, self.activation, self.learning_rate = metric, activation, learning_rate
        self.found = False
        self._tied = self._worse = 0
        self._untrained: float | None = None
        self._best = -math.inf
        self._row: Mapping[str, float] = {}
        self._lists = 0

    def logged(self, row: Mapping[str, float], lists: int) -> str | None:
        """A warning after this log line, at most once a run.

        Args:
            row: of the log: tied_lists, a share; score_spread and score_mean;
                lists_without_gradient, since the run began.
            lists: that the run has taken.
        """
        self._row, self._lists = row, lists
        self._tied = self._tied + 1 if row["tied_lists"] > 0.5 else 0
        if self._tied < _LINES:
            return None
        return self._say(
            f"in {row['tied_lists']:.0%} of the lists all documents have the same score, up to "
            f"rounding (mean spread {row['score_spread']:.2g})"
        )

    def evaluated(
        self, metrics: Mapping[str, float], step: int, *, greater_is_better: bool = True
    ) -> str | None:
        """A warning after this evaluation, at most once a run."""
        sign = 1 if greater_is_better else -1
        value = metrics[self.metric]
        if not step:
            self._untrained = value
            return None
        # ndcg@10 beside base_ndcg@10, NAME_ndcg@10 beside NAME_base_ndcg@10.
        bases = {key.replace("base_", "", 1): one for key, one in metrics.items() if "base_" in key}
        before = {"first stage's order": bases.get(self.metric), "untrained model": self._untrained}
        better = {
            name: one
            for name, one in before.items()
            if one is not None and sign * (one - value) > 0
        }
        self._worse = self._worse + 1 if better else 0
        gains = sign * value > self._best
        self._best = max(sign * value, self._best)
        if self._worse < _EVALUATIONS or gains:
            return None
        beside = " and ".join(f"the {name}'s {one:.4f}" for name, one in better.items())
        return self._say(
            f"{self.metric} was {value:.4f} beside {beside} in {self._worse} evaluations running"
        )

    def _say(self, seen: str) -> str | None:
        if self.found:
            return None
        self.found = True
        return f"The model may have collapsed: {seen}. {self._cause()}"

    def _cause(self) -> str:
        row = self._row
        idle = row.get("lists_without_gradient", 0)
        if idle > self._lists / 2:
            return (
                f"{idle:,.0f} of {self._lists:,} lists train nothing (labels all equal): "
                "look at the labels."
            )
        if isinstance(self.activation, nn.Sigmoid) and abs(row.get("score_mean", 0.0)) > _SATURATED:
            return (
                f"Scores lie around {row['score_mean']:.3g}, where the Sigmoid of predictions is "
                "saturated: a lower learning rate, or activation_fn Identity."
            )
        if row.get("tied_lists", 0.0) > 0.5:
            return (
                f"The learning rate, {self.learning_rate:g}, is often too high then: "
                "try a tenth of it."
            )
        return (
            "Scores differ without following the labels: a lower learning rate than "
            f"{self.learning_rate:g}, more steps, or labels that do not say what they should."
        )
