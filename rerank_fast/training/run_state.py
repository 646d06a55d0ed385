"""Everything that a run goes on from, beside the model: taken into a checkpoint and put back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rerank_fast.cards.energy import Energy
from rerank_fast.cards.record import Change
from rerank_fast.training import checkpoints
from rerank_fast.training.checkpoints import STATE_FILE, TENSORS_FILE
from rerank_fast.training.distributed import collectives
from rerank_fast.training.from_json import from_json
from rerank_fast.training.generators import generators_in, random_state, set_random_state
from rerank_fast.training.run_identity import find_changes
from rerank_fast.training.schedule import ScheduleState, load_schedule_state, schedule_state
from rerank_fast.training.weights import check_tensors

if TYPE_CHECKING:
    from rerank_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    epoch: int = 0  # of the next batch, and its number there
    batch: int = 0
    loss_sum: float = 0.0
    overflows: int = 0  # steps left out by fp16's scaler
    lists_without_gradient: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    evaluations_since_best: int = 0
    evaluated: int = 0  # step of the last evaluation
    evaluation_due: bool = False  # an interruption came before it
    evaluation_seconds: float = 0.0
    seconds: float = 0.0  # and what the machine took in them, where it was measured
    energy: Energy | None = None
    changes: list[Change] = field(default_factory=list)  # where it was resumed


@dataclass
class _Values:
    """What a checkpoint's JSON file holds."""

    step: int
    progress: Progress
    scheduler: ScheduleState
    scaler: dict[str, Any]
    random: list[dict[str, Any]]  # of each process
    log_position: int
    run: dict[str, Any]  # see describe_run
    max_tokens_per_microbatch: int
    memory: int
    frozen: str


def capture(
    trainer: Trainer, progress: Progress, *, log_position: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values and tensors of a run between two steps. All processes must call it: each has random
    numbers.
    """
    values = {
        "progress": asdict(progress),
        "scheduler": asdict(schedule_state(trainer.scheduler)),
        "scaler": trainer.scaler.state_dict(),
        "random": collectives.gather(random_state(trainer.model.device)),
        "log_position": log_position,
        "run": trainer.described,
        **trainer.backward.state_dict(),
        "frozen": trainer.trained.frozen,
    }
    return values, trainer.trained.state_dict(trainer.optimizer)


def restore(
    trainer: Trainer, checkpoint: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Progress:
    """Put a run back to where it was; nothing of it is touched before all is found to fit.

    Args:
        trainer: of the run that goes on.
        checkpoint: where the rest is from.
        content: of the checkpoint's JSON file.
        tensors: that it holds.

    Raises:
        ValueError: a field or tensor is missing, unknown, of another type or shape, or out of its
            range; names the file and the field. Or a setting, the data or the weights that are not
            trained are others.
    """
    device, trained = trainer.model.device, trainer.trained
    where = f"checkpoint {checkpoint}, {STATE_FILE}"
    values: _Values = from_json(_Values, content, where)
    progress = values.progress
    changes = find_changes(trainer, values.run, progress.step)
    if values.frozen != trained.frozen:
        raise ValueError(
            f"checkpoint {checkpoint} was trained on another base model than "
            f"{trainer.model.name_or_path} as it is now: weights that are not trained differ; "
            "after a run in this process adapters are merged already: open the base model anew"
        )
    same_lists = all(change.name != "train_lists" for change in changes)
    _check_values(trainer, values, trainer.num_batches if same_lists else None, where)
    check_tensors(
        tensors,
        trainer.weights,
        trainer.optimizer,
        stepped=values.scheduler.last_epoch > 0,
        averaged=bool(values.run.get("ema_decay")),
        where=f"checkpoint {checkpoint}, {TENSORS_FILE}",
    )
    trained.load_state_dict(tensors, trainer.optimizer)
    load_schedule_state(trainer.scheduler, values.scheduler)
    if values.scaler:
        trainer.scaler.load_state_dict(values.scaler)
    rank, processes, states = (
        trainer.processes.process_index,
        trainer.processes.num_processes,
        values.random,
    )
    if len(states) != processes and rank == 0:
        logger.warning(
            "%d processes go on from a run of %d: dropout differs", processes, len(states)
        )
    set_random_state(states[rank % len(states)], device)
    trainer.backward.load_state_dict(vars(values))
    progress.changes += changes
    _forget_other_best(trainer, progress)
    return progress


def _forget_other_best(trainer: Trainer, progress: Progress) -> None:
    """Choose the best anew where the model in the output is not the best that the checkpoint knows.

    A run that went on from the checkpoint before may have replaced it, or a save of it was killed.
    """
    output, checkpoint, metric = (
        trainer.output,
        trainer.resumed_from,
        trainer.config.metric_for_best,
    )
    saved = checkpoints.saved_best_step(output) if checkpoints.is_of(checkpoint, output) else 0
    if not progress.best or (saved == progress.best_step and metric in progress.best):
        return
    if trainer.processes.is_main_process:
        logger.warning(
            "The best model is chosen anew from here: %s knows that of step %d, measured by %s, "
            "and %s",
            checkpoint,
            progress.best_step,
            ", ".join(progress.best),
            f"{output} holds that of step {saved}" if saved else f"{output} does not hold it",
        )
    progress.best, progress.best_step = {}, 0


def _check_values(trainer: Trainer, values: _Values, num_batches: int | None, where: str) -> None:
    """That numbers are in their range, and that what is put back at the end can be put back.

    num_batches is how many an epoch has, where that is known.
    """
    progress, config = values.progress, trainer.config
    step = progress.step
    limits: dict[str, tuple[float, float]] = {
        "step": (1, trainer.num_steps),
        "batch": (0, step if num_batches is None else min(step, num_batches)),
        **dict.fromkeys(("epoch", "overflows", "best_step", "evaluated"), (0, step)),
        "evaluations_since_best": (0, step),
        "lists_without_gradient": (0, step * config.batch_size),
        "seconds": (0, math.inf),
    }
    given = [
        (f"progress, field {name}", getattr(progress, name), *limit)
        for name, limit in limits.items()
    ]
    given += [
        ("step", values.step, step, step),
        ("log_position", values.log_position, 0, math.inf),
        ("max_tokens_per_microbatch", values.max_tokens_per_microbatch, 1, math.inf),
        ("scheduler, field last_epoch", values.scheduler.last_epoch, 0, step),
    ]
    for name, value, least, most in given:
        if not least <= value <= most:
            raise ValueError(f"{where}, field {name}: expected from {least} to {most}, got {value}")
    scaler = trainer.scaler.state_dict()
    if values.scaler.keys() != scaler.keys() or not all(
        type(value) is type(scaler[name]) for name, value in values.scaler.items()
    ):
        raise ValueError(
            f"{where}, field scaler: expected {scaler}, or other numbers, got {values.scaler}"
        )
    if not values.random:
        raise ValueError(f"{where}, field random: expected the state of each process, got none")
    for rank, state in enumerate(values.random):
        try:
            generators_in(state)
        except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"{where}, field random[{rank}]: expected states of generators: {error!r:.200}"
            ) from error
