"""A Trainer from a recipe: its lists joined, some held out, its evaluator loaded."""

from __future__ import annotations

from pathlib import Path

from datasets import concatenate_datasets

from rerank_fast.data.held_out import hold_out
from rerank_fast.data.lists import load_lists
from rerank_fast.data.ms_marco import load_ms_marco
from rerank_fast.evaluation.nano_beir import NanoBEIREvaluator
from rerank_fast.recipes import Recipe
from rerank_fast.training.checkpoints import check_output
from rerank_fast.training.trainer import Trainer


def build_trainer(recipe: Recipe) -> Trainer:
    """Read everything a recipe names; nothing is trained yet.

    The lists of a query, from whichever source and however it is spelled, are all held out or all
    trained on.

    Raises:
        ValueError: a source can't be read, there are too few lists or queries to hold out as many
            lists, or an output that holds a model.
    """
    config = recipe.training
    # Before hours of reading.
    check_output(Path(config.output), resume=config.resume, overwrite=config.overwrite)
    evaluator = None
    if recipe.nano_beir:
        evaluator = NanoBEIREvaluator(
            recipe.nano_beir, recipe.nano_beir_id, rerank_k=recipe.rerank_k, at_k=config.at_k
        )
    parts = [] if recipe.ms_marco is None else [load_ms_marco(recipe.ms_marco)]
    parts += [load_lists(source) for source in recipe.lists]
    lists, held_out = concatenate_datasets(parts), None
    if recipe.held_out:
        lists, held_out = hold_out(lists, recipe.held_out, seed=config.seed)
    trainer = Trainer(recipe.model, lists, eval=held_out, evaluator=evaluator, config=config)
    trainer.card.sources = [*filter(None, [recipe.ms_marco]), *recipe.lists]
    return trainer
