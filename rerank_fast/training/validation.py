"""What a run measures its model by: metrics of evaluators, and the loss of the evaluation lists."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rerank_fast.data.lists import Source
from rerank_fast.evaluation.evaluator import Evaluator, greater_is_better, metric_names
from rerank_fast.evaluation.metrics import default_metrics, parse_metric
from rerank_fast.evaluation.reranking import RerankingEvaluator
from rerank_fast.objectives.base import Objective
from rerank_fast.objectives.combination import Combination
from rerank_fast.training.config import TrainingConfig

logger = logging.getLogger(__name__)


class Validation:
    """The evaluators of a run; calling it with a model gives all metrics, and eval_loss.

    Args:
        eval: evaluation lists; their metrics are named eval_ beside an evaluator's.
        evaluator: gives metrics for a model.
        config: the run's.
        objective: the run's.

    Raises:
        ValueError: metric_for_best is none of the metrics, or early stopping has nothing to go by.
    """

    def __init__(
        self,
        eval: Source | None,
        evaluator: Evaluator | None,
        config: TrainingConfig,
        objective: Objective,
    ) -> None:
        self.evaluators: list[Evaluator] = [] if evaluator is None else [evaluator]
        self.metric_for_best, self.greater_is_better = config.metric_for_best, True
        if eval is not None:
            name = "" if evaluator is None else "eval"
            further = _further(config.metric_for_best, name, config.at_k)
            lists = RerankingEvaluator(eval, at_k=config.at_k, name=name, metrics=further)
            if _takes_labels_of(objective, lists):
                lists.loss = validation_loss(objective, config.batch_size)
            self.evaluators.append(lists)
        names = [metric_names(one) for one in self.evaluators]
        if names and None not in names:  # else the first evaluation says it
            self._check([name for some in names for name in some or ()])
        if config.early_stopping_patience is not None and not self.evaluators:
            raise ValueError(
                f"early_stopping_patience is {config.early_stopping_patience}, but nothing is "
                "evaluated: it needs eval (--eval) or an evaluator"
            )

    def __bool__(self) -> bool:
        """Whether there is anything to measure by."""
        return bool(self.evaluators)

    def __call__(self, model: Any) -> dict[str, float]:
        """All metrics of a model.

        Raises:
            ValueError: metric_for_best is none of them.
        """
        metrics: dict[str, float] = {}
        for one in self.evaluators:
            given = one(model)
            metrics.update(given)
            if self.metric_for_best in given:
                self.greater_is_better = greater_is_better(one)
        self._check(list(metrics))
        return metrics

    def is_better(self, metrics: dict[str, float], best: dict[str, float]) -> bool:
        """Whether metrics, the last that were given, are better than the best before; empty is
        none.
        """
        if not best:
            return True
        value, before = metrics[self.metric_for_best], best[self.metric_for_best]
        return value > before if self.greater_is_better else value < before

    def _check(self, names: Sequence[str]) -> None:
        if self.metric_for_best not in names:
            raise ValueError(
                f"metric_for_best is {self.metric_for_best}, but there are {', '.join(names)}"
            )


def _further(metric_for_best: str, name: str, at_k: int) -> tuple[str, ...]:
    """What the evaluation lists, whose metrics have a name before theirs, are measured by beside
    the usual.
    """
    metric = metric_for_best.removeprefix(f"{name}_") if name else metric_for_best
    if metric in default_metrics(at_k) or (name and metric == metric_for_best):
        return ()
    try:
        parse_metric(metric)
    except ValueError:
        return ()
    return (metric,)


def _takes_labels_of(objective: Objective, lists: RerankingEvaluator) -> bool:
    """Whether the objective is defined on these lists; one that is not is said, and has no loss.

    A model that learns a teacher's scores may well be measured by grades.
    """
    for one in lists.set.candidates:
        try:
            objective.check(np.asarray(one.labels, dtype=np.float32))
        except ValueError as error:
            query = one.query if len(one.query) <= 80 else f"{one.query[:77]}..."
            logger.warning(
                "There is no eval_loss: the evaluation list of query %r has other labels: %s",
                query,
                error,
            )
            return False
    return True


def validation_loss(
    objective: Objective, batch_size: int
) -> Callable[[Tensor, Tensor, Tensor], float]:
    """The run's loss of given scores (N,), labels (N,) and offsets (Q + 1,), as a number.

    It is the mean that training takes, over all lists at once; of a sum, that of a batch's share.
    """

    def loss(scores: Tensor, labels: Tensor, offsets: Tensor) -> float:
        lists = scores, labels, offsets
        if not isinstance(objective, Combination):
            return _share(objective, *lists, batch_size)
        parts = zip(objective.objectives, objective.weights, strict=True)
        return sum(weight * _share(one, *lists, batch_size) for one, weight in parts)

    return loss


def _share(
    objective: Objective, scores: Tensor, labels: Tensor, offsets: Tensor, batch_size: int
) -> float:
    units = objective.num_units(labels.numpy(), offsets.numpy())
    assert not isinstance(units, tuple)
    with torch.no_grad():
        mean, left = objective.mean(scores, labels, offsets, units)
    if units is None:  # a sum: that of as many lists as a batch has
        return float(mean) * batch_size / (len(offsets) - 1)
    return float(mean) if left is None else float(mean) * max(units, 1) / max(int(left), 1)
