"""What a run is measured by: any function from a model to metrics, and what some say beyond
that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rerank_fast.evaluation.measured import MeasuredSet


class Evaluator(Protocol):
    """Gives a model's metrics by name, as sentence-transformers' evaluators do and any function
    may.

    One with an attribute `metric_names` says beforehand which those are; one with
    `greater_is_better` False says that the least is the best.
    """

    def __call__(self, model: Any, /) -> Mapping[str, float]: ...


def metric_names(evaluator: Evaluator) -> tuple[str, ...] | None:
    """The names of what it gives; None where only its first result says them."""
    names = getattr(evaluator, "metric_names", None)
    return None if names is None else tuple(names)


def greater_is_better(evaluator: Evaluator) -> bool:
    """Whether the largest value of its metrics is the best."""
    return bool(getattr(evaluator, "greater_is_better", True))


def measured_sets(evaluator: Evaluator) -> list[MeasuredSet]:
    """The sets of queries of one of this package's evaluators; none for any other."""
    if hasattr(evaluator, "sets"):
        return list(evaluator.sets)
    return [evaluator.set] if hasattr(evaluator, "set") else []
