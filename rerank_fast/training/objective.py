"""The objective of a run: what its settings name, or what its user made."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rerank_fast.objectives.base import Objective
from rerank_fast.objectives.combination import make_objective, make_objectives
from rerank_fast.objectives.lambda_loss import LambdaLoss
from rerank_fast.training.config import LAMBDA_LOSS, TrainingConfig


def choose_objective(config: TrainingConfig, own: Objective | None = None) -> Objective:
    """The run's objective, its options checked.

    Args:
        config: names it, if nobody made one.
        own: one that the user made.

    Raises:
        ValueError: an option that is none, an objective that is given twice, or
            in_batch_negatives where a label of 0 says nothing of relevance.
    """
    if own is not None:
        if not isinstance(own, Objective):
            raise ValueError(f"objective must be a rerank_fast.objectives.Objective, got {own!r}")
        default = TrainingConfig()
        for name in ("objective", "objective_options", *LAMBDA_LOSS):
            if getattr(config, name) != getattr(default, name):
                raise ValueError(
                    f"{name} {getattr(config, name)} would not be applied: an objective is given"
                )
        objective = own
    elif isinstance(config.objective, list):
        objective = make_objectives(config.objective)
    elif config.objective == LambdaLoss.name:
        objective = LambdaLoss(**{name: getattr(config, name) for name in LAMBDA_LOSS})
    else:
        objective = make_objective(config.objective, config.objective_options)
    if config.in_batch_negatives:
        for one in objective.parts:
            if not one.zero_is_irrelevant:
                raise ValueError(
                    f"in_batch_negatives must be 0 with objective {one.name}: a document of "
                    "another list has no label that it could learn from, got "
                    f"{config.in_batch_negatives}"
                )
    return objective


def described_settings(config: TrainingConfig, own: Objective | None) -> dict[str, Any]:
    """All settings as plain values; an objective that the user made stands in place of those it
    replaces.
    """
    settings = asdict(config)
    if own is None:
        return settings
    kept = {name: value for name, value in settings.items() if name not in LAMBDA_LOSS}
    described = {"name": own.name, **own.describe()}
    # As a checkpoint keeps it.
    return {
        **kept,
        "objective": json.loads(json.dumps(described, default=str)),
    }
