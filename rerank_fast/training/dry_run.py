"""What a training run would do: everything is read and counted, nothing is trained or written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from rerank_fast.data.held_out import query_keys
from rerank_fast.evaluation.evaluator import measured_sets
from rerank_fast.training.distributed import collectives

if TYPE_CHECKING:
    from rerank_fast.training.trainer import Trainer


@dataclass
class Counted:
    """The training lists, and what their first epoch takes of them."""

    lists: int = 0
    documents: int = 0
    lists_without_gradient: int = 0
    pairs: int = 0  # (query, document), of the lists that train
    truncated: int = 0  # of these
    # Of each part of the objective; see Objective.unit.
    units: list[int] = field(default_factory=list)
    negatives: int = 0  # documents added from other lists
    queries: set[int] = field(default_factory=set)  # keys of query_keys


def count(trainer: Trainer) -> Counted:
    """Read every list and tokenise its pairs, as the first epoch will; every process must call it.

    Raises:
        ValueError: a row of a stream is malformed; names the file and the line.
    """
    parts = trainer.objective.parts
    counted = Counted(units=[0] * len(parts))

    def queries() -> Iterator[str]:  # of lists as they are, before documents are drawn of them
        for row in trainer.lists:
            counted.documents += len(row["docs"])
            yield row["query"]

    counted.queries = set(query_keys(queries()).tolist())
    shows = trainer.config.show_progress_bar and trainer.processes.is_main_process
    with tqdm(total=trainer.num_batches, desc="Counting", unit="batch", disable=not shows) as bar:
        for batch in trainer.batches():
            if batch.epoch:
                break
            counted.lists += len(batch.indices)
            counted.lists_without_gradient += batch.lists_without_gradient
            counted.pairs += batch.num_documents
            counted.truncated += batch.lists.truncated  # of this process's share
            units = batch.units if isinstance(batch.units, tuple) else (batch.units,)
            counted.units = [
                total + (one or 0) for total, one in zip(counted.units, units, strict=True)
            ]
            counted.negatives += batch.negatives_added
            bar.update()
    counted.truncated = sum(collectives.gather(counted.truncated))
    return counted


def describe(trainer: Trainer) -> list[str]:
    """Lines that say what there is to train and to evaluate on, how, and what would be written."""
    counted, config, model = count(trainer), trainer.config, trainer.model
    drawn = config.max_docs_per_list is not None or config.in_batch_negatives > 0
    units = zip(counted.units, trainer.objective.parts, strict=True)
    what = [f"{number:,} {part.unit}, " for number, part in units if part.unit]
    added = f" ({counted.negatives:,} with documents of other lists)" if counted.negatives else ""
    truncated = f"{counted.truncated:,} of them longer than {model.max_length} tokens and truncated"
    if model.max_length is None:
        truncated = "none of them truncated"
    return [
        f"Training lists: {counted.lists:,} with {counted.documents:,} documents; "
        f"{counted.lists_without_gradient:,} of the lists, {trainer.objective.idle}, train nothing",
        f"{'First epoch' if drawn else 'Epoch'}: {''.join(what)}"
        f"{counted.pairs:,} pairs to score{added}, {truncated}",
        *_evaluations(trainer, counted.queries),
        f"Steps: {trainer.num_steps:,} of {config.batch_size} lists, {_epochs(trainer)}",
        f"Precision: {config.precision} on {model.device}",
        _output(trainer),
    ]


def _evaluations(trainer: Trainer, trained: set[int]) -> list[str]:
    sets = [one for evaluator in trainer.validation.evaluators for one in measured_sets(evaluator)]
    if not sets:
        return ["Evaluation: none"]
    lines = []
    for one in sets:
        keys = query_keys(candidates.query for candidates in one.candidates)
        both = sum(key in trained for key in keys.tolist())
        _, truncated = trainer.model.tokenize_counting(one.pairs)
        lines.append(
            f"Evaluation{f' {one.name}' if one.name else ''}: {len(one.candidates):,} lists with "
            f"{len(one.pairs):,} documents, {truncated:,} of them truncated; {both:,} of the "
            "queries are trained on too"
        )
    return lines


def _epochs(trainer: Trainer) -> str:
    if trainer.num_batches is None:
        return "of a stream"
    return f"{trainer.num_steps / trainer.num_batches:g} epochs of {trainer.num_batches:,} steps"


def _output(trainer: Trainer) -> str:
    config, output = trainer.config, Path(trainer.config.output)
    made = "there" if output.is_dir() else "to be made"
    begins = f"goes on from {trainer.resumed_from}" if trainer.resumed_from else "begins anew"
    chosen = "the last model"
    if trainer.validation.evaluators:
        chosen = f"the best model by {config.metric_for_best} of every {config.eval_steps} steps"
    files = ["README.md", "metrics.json", "train_log.jsonl", *config.trackers]
    return (
        f"Would write to {output} ({made}; the run {begins}): {chosen}; a checkpoint every "
        f"{config.save_steps} steps, the newest {config.save_total_limit} kept; {', '.join(files)}"
    )
