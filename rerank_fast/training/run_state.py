"""Everything that a run goes on from, beside the model: taken into a checkpoint and put back."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rerank_fast.training import checkpoints, distributed

if TYPE_CHECKING:
    from rerank_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)

# With another of these, the position in the order of the lists would mean nothing.
_ORDER = ("batch_size", "seed", "max_docs_per_list", "streaming", "shuffle_buffer")
# And these say what the checkpoint's weights are; it holds only those that were trained.
_WEIGHTS = ("precision", "freeze_layers", "freeze", "lora_rank", "lora_alpha", "lora_target_modules")
_MUST_AGREE = (*_ORDER, *_WEIGHTS)
_FREE = ("output", "overwrite", "resume", "trackers", "show_progress_bar", "logging_steps", "save_steps")


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    epoch: int = 0  # of the next batch, and its number there
    batch: int = 0
    loss_sum: float = 0.0
    overflows: int = 0  # steps left out by fp16's scaler
    lists_without_pairs: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    evaluations_since_best: int = 0
    evaluated: int = 0  # step of the last evaluation
    evaluation_due: bool = False  # an interruption came before it
    seconds: float = 0.0  # and what the machine took in them, where it was measured
    energy: dict[str, Any] | None = None


def capture(trainer: Trainer, progress: Progress, *, log_position: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values and tensors of a run between two steps. All processes must call it: each has random numbers."""
    schedule = trainer.scheduler.state_dict()
    values = {
        "progress": asdict(progress),
        "scheduler": {key: schedule[key] for key in ("last_epoch", "_step_count")},
        "scaler": trainer.scaler.state_dict(),
        "random": distributed.gather(random_state(trainer.model.device)),
        "log_position": log_position,
        "num_lists": trainer.num_lists,
        "config": asdict(trainer.config),
        "max_tokens_per_microbatch": trainer.backward.max_tokens,
        "memory": trainer.backward.memory,
        "sample_of_base": trainer.trained.sample_of_base(),
    }
    parts = {f"weights.{name}": weight.detach() for name, weight in trainer.weights.items()}
    for name, weight in trainer.weights.items():
        for key, value in trainer.optimizer.state.get(weight, {}).items():
            parts[f"optimizer.{name}.{key}"] = value
    if trainer.trained.average is not None:
        parts.update({f"average.{name}": value for name, value in trainer.trained.average.weights.items()})
    tensors = {}
    for name, part in parts.items():
        whole = trainer.trained.gathered(part)
        if trainer.processes.is_main_process:  # the one that writes
            # Shards gathered on a GPU would not fit there together.
            tensors[name] = whole if whole is part else whole.cpu()
    return values, tensors


@torch.no_grad()
def restore(trainer: Trainer, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Progress:
    """Put a run back to where it was.

    Raises:
        ValueError: a setting, the base model of adapters or the number of lists is another, so that the run would
            not be the same.
    """
    _check_settings(trainer, values)
    missing = {f"weights.{name}" for name in trainer.weights} - tensors.keys()
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} of the weights to train, as {min(missing)}")
    device, trained = trainer.model.device, trainer.trained
    if values.get("sample_of_base") != trained.sample_of_base():
        raise ValueError(
            f"the checkpoint's adapters are of another base model than {trainer.model.name_or_path} as it is now; "
            "after a run in this process they are merged already: open the base model anew"
        )
    for name, weight in trainer.weights.items():
        weight.copy_(trained.part_of(tensors[f"weights.{name}"].to(device), weight))
        start = f"optimizer.{name}."
        for key in [key for key in tensors if key.startswith(start) and "." not in key[len(start) :]]:
            value = trained.part_of(tensors[key].to(device, copy=True), weight)
            trainer.optimizer.state[weight][key[len(start) :]] = value
    if trained.masters is not None:
        trained.masters.write_back()
    if trained.average is not None:
        for name, value in trained.average.weights.items():
            saved = tensors.get(f"average.{name}", tensors[f"weights.{name}"])  # an average that begins here
            value.copy_(trained.part_of(saved.to(device), value))
    scheduler = trainer.scheduler
    step = values["scheduler"]["last_epoch"]
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict({**scheduler.state_dict(), **values["scheduler"], "_last_lr": rates})
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if values["scaler"]:
        trainer.scaler.load_state_dict(dict(values["scaler"]))
    rank, states = trainer.processes.process_index, values["random"]
    if len(states) != trainer.processes.num_processes:
        logger.warning("%d processes go on from a run of %d: dropout differs", rank + 1, len(states))
    set_random_state(states[rank % len(states)], device)
    if trainer.config.max_tokens_per_microbatch is None:
        # Another cut of a batch drops out and rounds differently, and this machine may be another.
        trainer.backward.max_tokens = values["max_tokens_per_microbatch"]
    if values["memory"] <= 2 * trainer.backward.memory:  # half of what was free: that much may be taken here too
        trainer.backward.memory = values["memory"]
    progress = Progress(**values["progress"])
    _forget_other_best(trainer, progress)
    return progress


def _forget_other_best(trainer: Trainer, progress: Progress) -> None:
    """Choose the best anew where the model in the output is not the best that the checkpoint knows.

    A run that went on from the checkpoint before may have replaced it, or a save of it was killed.
    """
    output, checkpoint, metric = trainer.output, trainer.resumed_from, trainer.config.metric_for_best
    saved = checkpoints.saved_best_step(output) if checkpoints.is_of(checkpoint, output) else 0
    if not progress.best or (saved == progress.best_step and metric in progress.best):
        return
    if trainer.processes.is_main_process:
        logger.warning(
            "The best model is chosen anew from here: %s knows that of step %d, measured by %s, and %s",
            checkpoint,
            progress.best_step,
            ", ".join(progress.best),
            f"{output} holds that of step {saved}" if saved else f"{output} does not hold it",
        )
    progress.best, progress.best_step = {}, 0


def _check_settings(trainer: Trainer, values: Mapping[str, Any]) -> None:
    now, then = asdict(trainer.config), values["config"]
    changed = [name for name in now if name not in _FREE and now[name] != then.get(name)]
    for name in changed:
        if name in _MUST_AGREE:
            raise ValueError(
                f"{name} must be the interrupted run's to go on from it: {then.get(name)}, got {now[name]}; to "
                f"train on with another, begin a run with {trainer.resumed_from} as its model and another output"
            )
    if values["num_lists"] != trainer.num_lists:
        raise ValueError(
            f"train_lists must be the interrupted run's to go on from it: {values['num_lists']} lists, "
            f"got {trainer.num_lists}"
        )
    if changed:
        logger.warning("Going on with other settings than the interrupted run: %s", ", ".join(changed))


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a run may draw from, as plain numbers."""
    legacy: Any = np.random.get_state()
    name, keys, place, has_gauss, gauss = legacy
    version, internal, next_gauss = random.getstate()
    return {
        "python": [version, list(internal), next_gauss],
        "numpy": [name, keys.tolist(), place, has_gauss, gauss],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)
