"""Several objectives added up, and objectives made of plain settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from rerank_fast.objectives import objective_class
from rerank_fast.objectives.base import Objective, ObjectiveSum, Units
from rerank_fast.ops.options import check_positive


@dataclass(frozen=True)
class Combination(Objective):
    """The weighted sum of objectives' losses, each the mean over units of its own.

    It has no sum of its own, only `mean`.

    Args:
        objectives: one or more.
        weights: of each, above 0.

    Raises:
        ValueError: a weight is none, or an objective can't be one of several: where a cut by rank
            decides its units, the divisor of its share is known only when the whole batch is
            scored, which is too late to scale it apart from the others.
    """

    objectives: tuple[Objective, ...]
    weights: tuple[float, ...]

    name: ClassVar[str] = "combination"
    idle: ClassVar[str] = "that give none of the objectives a gradient"

    def __post_init__(self) -> None:
        if not self.objectives or len(self.objectives) != len(self.weights):
            counts = f"{len(self.objectives)} and {len(self.weights)}"
            raise ValueError(f"expected objectives and a weight for each, got {counts}")
        for one, weight in zip(self.objectives, self.weights, strict=True):
            check_positive(f"the weight of {one.name}", weight)
            if isinstance(one, Combination):
                raise ValueError("an objective of several must not be several itself")
            if one.cut_by_rank:
                raise ValueError(
                    f"objective {one.name} with a cut k and the mean over {one.unit or 'units'} "
                    "can't be one of several: expected k null, or reduction lists or sum"
                )

    def mean(self, scores: Tensor, labels: Tensor, offsets: Tensor, units: Units) -> ObjectiveSum:
        assert isinstance(units, tuple)
        parts = zip(self.objectives, self.weights, units, strict=True)
        means = [
            weight * one.mean(scores, labels, offsets, count).total for one, weight, count in parts
        ]
        total = means[0]
        for mean in means[1:]:
            total = total + mean
        return ObjectiveSum(total)

    def num_units(self, labels: np.ndarray, offsets: np.ndarray) -> tuple[int | None, ...]:
        counts = (one.num_units(labels, offsets) for one in self.objectives)
        return tuple(count for count in counts if not isinstance(count, tuple))

    @property
    def scores_idle(self) -> bool:
        return any(one.scores_idle for one in self.objectives)

    @property
    def parts(self) -> tuple[Objective, ...]:
        return self.objectives

    def contributes(self, labels: np.ndarray) -> bool:
        return any(one.contributes(labels) for one in self.objectives)

    def check(self, labels: np.ndarray) -> None:
        for one in self.objectives:
            one.check(labels)

    def advice(self, labels: np.ndarray) -> str | None:
        return "; ".join(said for one in self.objectives if (said := one.advice(labels))) or None

    def describe(self) -> dict[str, Any]:
        parts = zip(self.objectives, self.weights, strict=True)
        described = [
            {"name": one.name, "weight": weight, **one.describe()} for one, weight in parts
        ]
        return {"objectives": described}


def make_objective(name: str, options: Mapping[str, Any]) -> Objective:
    """An objective by its name and its options.

    Raises:
        ValueError: no such objective, or an option that it does not have, or takes another value;
            lists those that there are.
    """
    kind = objective_class(name)
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"objective {name} has no option {option!r}; {there}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"objective {name}: {error}") from error


def make_objectives(settings: Sequence[Mapping[str, Any]]) -> Objective:
    """The weighted sum of objectives, each {"name": ..., "weight": 1, and its options}.

    Raises:
        ValueError: as make_objective and Combination.
    """
    weights = tuple(one.get("weight", 1.0) for one in settings)
    objectives = []
    for one in settings:
        options = {name: value for name, value in one.items() if name not in ("name", "weight")}
        objectives.append(make_objective(one["name"], options))
    return Combination(tuple(objectives), weights)
