"""What makes a run the run it is: settings and data, and which may change where it goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rerank_fast.cards.record import Change
from rerank_fast.data.fingerprint import fingerprint
from rerank_fast.evaluation.evaluator import measured_sets
from rerank_fast.training.config import TrainingConfig

if TYPE_CHECKING:
    from rerank_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)

# With another of these, the position in the order of the lists would mean nothing.
_ORDER = ("batch_size", "seed", "max_docs_per_list", "streaming", "shuffle_buffer")
# And these say what the checkpoint's tensors are; it holds only those that were trained.
_WEIGHTS = (
    "precision", "optimizer", "freeze_layers", "freeze", "lora_rank", "lora_alpha",
    "lora_target_modules",
)  # fmt: skip
_MUST_AGREE = (*_ORDER, *_WEIGHTS)
# Where a run writes, when it saves and what it shows of itself.
_FREE = (
    "output", "overwrite", "resume", "resume_changed", "trackers",
    "show_progress_bar",
    "logging_steps", "save_steps", "save_total_limit", "distributed_timeout", "eval_on_start",
    "load_best",
)  # fmt: skip
# How a step is computed, which depends on the machine: the gradient is the same but for its
# rounding and for what dropout draws. The number of processes is of this kind too.
_EXECUTION = (
    "gradient_accumulation_steps", "gradient_cache", "mini_batch_size", "max_tokens_per_microbatch",
    "sharding", "gradient_checkpointing", "torch_compile", "cuda_graphs",
)  # fmt: skip


def describe_run(trainer: Trainer) -> dict[str, Any]:
    """Settings and data as plain values, for a checkpoint to keep.

    Of lists it is their number and fingerprint; of a stream, those of what has been read of it
    before the run. Of an evaluator that is a function, only that there is one.
    """
    lists = trainer.card.lists
    size, stream = lists.size, ""
    if size is None:
        size, stream = lists.counted, "a stream that begins with "
    return {
        **trainer.settings,
        "max_length": trainer.model.max_length,
        "train_lists": f"{stream}{size} lists {lists.fingerprint}",
        "eval": [_described(one) for one in trainer.validation.evaluators],
    }


def _described(evaluator: Any) -> str:
    sets = measured_sets(evaluator)
    if not sets:
        return f"a {type(evaluator).__qualname__}"
    candidates = [one for part in sets for one in part.candidates]
    rows = [{"query": one.query, "docs": one.docs, "labels": one.labels} for one in candidates]
    return f"{len(rows)} lists {fingerprint(rows)}"


def find_changes(trainer: Trainer, before: Mapping[str, Any], step: int) -> list[Change]:
    """What is new in a run that goes on from a step, compared to describe_run's values before.

    Raises:
        ValueError: something has changed that may not, or only with resume_changed; names both
            values.
    """
    # A setting that is younger than the checkpoint had its default.
    before, now = {**asdict(TrainingConfig()), **before}, trainer.described
    changed = [
        Change(step, name, before.get(name), value)
        for name, value in now.items()
        if name not in _FREE and value != before.get(name)
    ]
    for one in changed:
        if one.name in _MUST_AGREE:
            raise ValueError(
                f"{one.name} must be the interrupted run's to go on from it: {one.before}, got "
                f"{one.now}; to train on with another, begin a run with {trainer.resumed_from} as "
                "its model and another output"
            )
    for one in changed:
        if one.name in _EXECUTION:
            logger.warning(
                "Going on with %s %s, the interrupted run had %s: rounding and dropout differ",
                one.name,
                one.now,
                one.before,
            )
    changed = [one for one in changed if one.name not in _EXECUTION]
    if changed and not trainer.config.resume_changed:
        listed = "; ".join(f"{one.name} was {one.before}, got {one.now}" for one in changed)
        raise ValueError(
            f"{trainer.resumed_from} is of a run with other settings or data: {listed}. Give the "
            "interrupted run's, or go on with the new ones by resume_changed=True "
            "(--resume_changed): the card tells them"
        )
    return changed
