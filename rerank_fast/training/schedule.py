"""How the learning rate rises and falls over a run: transformers' schedules by name."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from rerank_fast.training.config import TrainingConfig


@dataclass
class ScheduleState:
    """What a scheduler of torch counts; the rest of it follows from the settings."""

    last_epoch: int  # steps of the optimizer
    _step_count: int


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, num_steps: int
) -> LambdaLR:
    """The schedule that the settings name, over the steps of a run.

    Raises:
        ValueError: it lacks an option that it needs, or refuses one.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * num_steps)
    # They take no options, and say nothing.
    plain = config.schedule in (
        "constant",
        "constant_with_warmup",
    )
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


def schedule_state(schedule: LambdaLR) -> ScheduleState:
    state = schedule.state_dict()
    return ScheduleState(state["last_epoch"], state["_step_count"])


def load_schedule_state(schedule: LambdaLR, state: ScheduleState) -> None:
    """Put it back to where it was, and the optimizer's learning rates with it."""
    step = state.last_epoch
    rates = [
        base * factor(step)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    schedule.load_state_dict({**schedule.state_dict(), **asdict(state), "_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
