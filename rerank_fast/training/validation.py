"""What a run measures its model by: metrics of evaluators, and the loss of the evaluation lists."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rerank_fast.data.lists import Source
from rerank_fast.evaluation.reranking import RerankingEvaluator
from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.objectives.base import Objective
from rerank_fast.training.config import TrainingConfig

logger = logging.getLogger(__name__)

LOSS = "eval_loss"


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
        evaluator: Callable[[CrossEncoder], dict[str, float]] | None,
        config: TrainingConfig,
        objective: Objective,
    ) -> None:
        self.evaluators: list[Any] = [] if evaluator is None else [evaluator]
        if eval is not None:
            name = "" if evaluator is None else "eval"
            loss = validation_loss(objective, config.batch_size)
            lists = RerankingEvaluator(eval, at_k=config.at_k, name=name, loss=loss)
            self.evaluators.append(lists)
        names = [name for one in self.evaluators for name in getattr(one, "metric_names", [config.metric_for_best])]
        if names and config.metric_for_best not in names:
            raise ValueError(f"metric_for_best is {config.metric_for_best}, but there are {', '.join(names)}")
        if config.early_stopping_patience is not None and not self.evaluators:
            raise ValueError(
                f"early_stopping_patience is {config.early_stopping_patience}, but nothing is "
                "evaluated: it needs eval (--eval) or an evaluator"
            )

    def __bool__(self) -> bool:
        """Whether there is anything to measure by."""
        return bool(self.evaluators)

    def __call__(self, model: Any) -> dict[str, float]:
        return {name: value for one in self.evaluators for name, value in one(model).items()}


def validation_loss(objective: Objective, batch_size: int) -> Callable[[Tensor, Tensor, Tensor], float]:
    """The run's loss of given scores (N,), labels (N,) and offsets (Q + 1,), as a number.

    It is the mean that training takes, over all lists at once; of a sum, that of a batch's share.
    """

    def loss(scores: Tensor, labels: Tensor, offsets: Tensor) -> float:
        units = objective.num_units(labels.numpy(), offsets.numpy())
        with torch.no_grad():
            mean, left = objective.mean(scores, labels, offsets, units)
        if units is None:
            return float(mean) * batch_size / (len(offsets) - 1)
        if left is not None:
            assert isinstance(units, int)
            return float(mean) * max(units, 1) / max(int(left), 1)
        return float(mean)

    return loss
