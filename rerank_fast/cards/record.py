"""A run as its card sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rerank_fast.evaluation.evaluator import Evaluator
from rerank_fast.objectives.base import Objective

if TYPE_CHECKING:
    from rerank_fast.model.cross_encoder import CrossEncoder


@dataclass(frozen=True)
class Change:
    """A setting, train_lists or eval, that is another one from a step on."""

    step: int
    name: str
    before: Any
    now: Any


@dataclass(frozen=True)
class RunRecord:
    """A run that has ended: what was trained, how, and what came of it."""

    model: CrossEncoder
    output: Path  # holds the saved model and train_log.jsonl
    objective: Objective
    settings: Mapping[str, Any]  # all of them, as plain values
    defaults: Mapping[str, Any]
    max_tokens_per_microbatch: int  # as it came out
    evaluators: Sequence[Evaluator]
    metric_for_best: str
    evaluated_in: torch.dtype  # of the arithmetic that gave the scores
    metrics: Mapping[str, float]  # of the saved model
    best_step: int
    steps: int
    num_steps: int  # that there would have been
    seconds: float
    evaluation_seconds: float  # those of them in which the model was measured
    num_processes: int
    holds_the_saved_model: bool  # whether model is the one that was saved
