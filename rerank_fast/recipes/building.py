"""A Trainer from a recipe: its lists joined, some held out, its evaluator loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset, concatenate_datasets

from rerank_fast.data.held_out import hold_out, queries_of, query_keys
from rerank_fast.data.lists import load_lists, names_of
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
    lists, held_out = _lists(recipe, recipe.labels), None
    if recipe.held_out:
        lists, held_out = hold_out(lists, recipe.held_out, seed=config.seed)
        if recipe.labels == "scores":
            held_out = _by_relevance(recipe, held_out)
    trainer = Trainer(recipe.model, lists, eval=held_out, evaluator=evaluator, config=config)
    own = [name for source in recipe.lists for name in names_of(source)]
    trainer.card.sources = [*filter(None, [recipe.ms_marco]), *own]
    return trainer


def _lists(recipe: Recipe, labels: Literal["relevance", "scores"]) -> Dataset:
    parts = [] if recipe.ms_marco is None else [load_ms_marco(recipe.ms_marco)]
    return concatenate_datasets([*parts, *(load_lists(one, labels=labels) for one in recipe.lists)])


def _by_relevance(recipe: Recipe, held_out: Dataset) -> Dataset:
    """The held-out queries' lists with the labels that a metric is of, not a teacher's scores."""
    lists = _lists(recipe, "relevance")
    held = np.isin(query_keys(queries_of(lists)), query_keys(queries_of(held_out)))
    return lists.select(np.flatnonzero(held))
