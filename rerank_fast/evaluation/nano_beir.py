"""NanoBEIR: thirteen small retrieval sets, their BM25 rankings reranked, and the mean over sets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rerank_fast.data.nano_beir import DATASETS, load_nano_beir, split_name
from rerank_fast.evaluation.candidates import rank_candidates
from rerank_fast.evaluation.measured import (
    MeasuredSet,
    PairScorer,
    ResultsFile,
    note_in_model_card,
    output_directory,
    query_means,
)

logger = logging.getLogger(__name__)


class NanoBEIREvaluator:
    """Reranks the BM25 rankings of NanoBEIR sets; all sets' pairs are scored in one stream.

    Args:
        dataset_names: short names, in any letter case; None takes all but arguana and touche2020,
            whose task is another, as sentence-transformers does.
        dataset_id: hub id, or a local directory with files SUBSET/NanoX.parquet,
            SUBSET/NanoX-*.parquet or SUBSET/NanoX.jsonl for SUBSET in corpus (_id, text), queries
            (_id, text), qrels (query-id, corpus-id) and bm25 (query-id, corpus-ids): a downloaded
            copy of the hub dataset is such a directory.
        rerank_k: documents of each BM25 ranking.
        at_k: cut of MRR and NDCG.
        always_rerank_positives: also score the relevant documents that BM25 missed.
        metrics: further ones of ir-measures, e.g. "R@100"; each result has the name given here.
        batch_size: most pairs per forward pass; None lets their tokens decide.
        show_progress_bar: while scoring.
        write_csv: with an output_path, add rows of means to sentence-transformers' CSV files there.
        write_per_query: with an output_path, write the last call's values of each query as CSV, a
            file a set.
        write_run: with an output_path, write the last call's order as a TREC run, a file a set.
        aggregate_fn: one value from the sets' values.
        aggregate_key: its name.

    Calling it with a model (this package's or sentence-transformers' CrossEncoder) returns
    {"NanoMSMARCO_R100_ndcg@10": ..., "NanoBEIR_R100_mean_ndcg@10": ...} and so on for map and
    mrr@k, and each with "base_" for BM25. In sentence-transformers' CrossEncoderTrainer it goes in
    as evaluator=[NanoBEIREvaluator(...)]. Where documents tie in score every metric is its expected
    value over the orders of the tie.

    Raises:
        ValueError: an unknown set or metric (lists those that there are), or data that can't be
            read.
    """

    greater_is_better = True

    def __init__(
        self,
        dataset_names: Sequence[str] | None = None,
        dataset_id: str | Path = "sentence-transformers/NanoBEIR-en",
        rerank_k: int = 100,
        at_k: int = 10,
        always_rerank_positives: bool = True,
        *,
        metrics: Sequence[str] = (),
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        write_csv: bool = True,
        write_per_query: bool = False,
        write_run: bool = False,
        aggregate_fn: Callable[[list[float]], float] = np.mean,
        aggregate_key: str = "mean",
    ) -> None:
        if dataset_names is None:
            dataset_names = [name for name in DATASETS if name not in ("arguana", "touche2020")]
        if isinstance(dataset_names, str) or not dataset_names:
            raise ValueError(
                f"dataset_names must be a list of names or None for all, got {dataset_names!r}"
            )
        if rerank_k < 1:
            raise ValueError(f"rerank_k must be at least 1, got {rerank_k}")
        # All, before any is read.
        splits = {name: split_name(name) for name in dict.fromkeys(dataset_names)}
        self.dataset_names = list(splits)
        self.dataset_id = str(dataset_id)
        self.rerank_k = rerank_k
        self.at_k = at_k
        self.always_rerank_positives = always_rerank_positives
        self.write_csv = write_csv
        self.write_per_query = write_per_query
        self.write_run = write_run
        self.aggregate_fn = aggregate_fn
        self.aggregate_key = aggregate_key
        self.name = f"NanoBEIR_R{rerank_k}_{aggregate_key}"
        self.sets = []
        for name, split in splits.items():
            candidates = [
                rank_candidates(
                    one.query_id,
                    one.query,
                    one.positive,
                    one.documents,
                    always_rerank_positives=always_rerank_positives,
                )
                for one in load_nano_beir(name, self.dataset_id, rerank_k=rerank_k)
            ]
            self.sets.append(
                MeasuredSet(candidates, name=f"{split}_R{rerank_k}", at_k=at_k, metrics=metrics)
            )
        self.metrics = self.sets[0].metrics
        self.primary_metric = f"{self.name}_ndcg@{at_k}"
        self.metric_names = tuple(
            [one.prefixed(metric) for one in self.sets for metric in self.metrics]
            + [f"{self.name}_{metric}" for metric in self.metrics]
        )
        self.score = PairScorer(
            [pair for one in self.sets for pair in one.pairs],
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )
        self._bounds = np.cumsum([len(one.pairs) for one in self.sets])[:-1]

    @property
    def description(self) -> str:
        return "Cross Encoder Nano BEIR"

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that sentence-transformers' model card shows."""
        names = ("dataset_names", "dataset_id", "rerank_k", "at_k", "always_rerank_positives")
        return {name: getattr(self, name) for name in names}

    def _measure(self, model: Any, output_path: str | None) -> list[dict[str, np.ndarray]]:
        """Each set's values of each query, and the last call's files."""
        directory = None if output_path is None else output_directory(output_path)
        measured = []
        for one, scores in zip(self.sets, np.split(self.score(model), self._bounds), strict=True):
            measured.append(one.measure(scores))
            if directory is not None:
                if self.write_per_query:
                    one.write_per_query(directory / f"{one.name}_per_query.csv", measured[-1])
                if self.write_run:
                    one.write_run(directory / f"{one.name}.run", scores)
        return measured

    def evaluate_per_query(
        self, model: Any, output_path: str | None = None
    ) -> dict[str, np.ndarray]:
        """Each metric of each set as an array of its queries, under the set's key.

        Where the aggregate is the mean over sets, its key holds all queries' values, weighted so
        that their mean is the mean over sets: a paired test of two models compares that too.
        """
        measured = self._measure(model, output_path)
        result = {
            one.prefixed(name): column
            for one, values in zip(self.sets, measured, strict=True)
            for name, column in values.items()
        }
        if self.aggregate_fn is np.mean:
            count = sum(len(one.candidates) for one in self.sets)
            for name in measured[0]:
                weighted = [
                    values[name] * (count / (len(measured) * len(values[name])))
                    for values in measured
                ]
                result[f"{self.name}_{name}"] = np.concatenate(weighted)
        return result

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Each set's means, then the aggregates; with an output_path also the files asked for.

        Raises:
            ValueError: output_path can't be written, before anything is scored; a score is NaN.
        """
        files = []
        if output_path is not None and self.write_csv:
            names = [
                f"CrossEncoderRerankingEvaluator_{one.name}_results_@{self.at_k}.csv"
                for one in self.sets
            ]
            names.append(f"NanoBEIR_evaluation_{self.aggregate_key}_results.csv")
            files = [ResultsFile(output_path, name, self.metrics) for name in names]
        every = [query_means(values) for values in self._measure(model, output_path)]
        results: dict[str, float] = {}
        for one, means in zip(self.sets, every, strict=True):
            results.update({one.prefixed(name): value for name, value in means.items()})
            note_in_model_card(one, model, means, one.name, epoch, steps)
        aggregates = {
            name: float(self.aggregate_fn([means[name] for means in every])) for name in every[0]
        }
        for metric in self.metrics:
            base = aggregates[f"base_{metric}"]
            logger.info(
                "NanoBEIR %-8s BM25 %.4f -> reranked %.4f", metric, base, aggregates[metric]
            )
        for file, means in zip(files, [*every, aggregates], strict=False):
            file.append(epoch, steps, means)
        note_in_model_card(self, model, aggregates, self.name, epoch, steps)
        return {**results, **{f"{self.name}_{name}": value for name, value in aggregates.items()}}
