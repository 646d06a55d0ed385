"""How the learning rate rises and falls over a run: transformers' schedules by name."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from rerank_fast.training.config import TrainingConfig


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig, num_steps: int) -> LambdaLR:
    """The schedule that the settings name, over the steps of a run.

    Raises:
        ValueError: it lacks an option that it needs, or refuses one.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * num_steps)
    plain = config.schedule in ("constant", "constant_with_warmup")  # they take no options, and say nothing
    try:
        if plain and config.schedule_options:
            raise ValueError("it has none")
        schedule = get_scheduler(
            config.schedule,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=dict(config.schedule_options),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"schedule {config.schedule} with schedule_options {config.schedule_options}: {error}"
        ) from error
    assert isinstance(schedule, LambdaLR)
    return schedule
