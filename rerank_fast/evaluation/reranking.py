"""Reranking evaluation: MAP, MRR@k, NDCG@k and others of a model's order beside the first
stage's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rerank_fast.evaluation.candidates import load_candidates
from rerank_fast.evaluation.measured import (
    MeasuredSet,
    PairScorer,
    ResultsFile,
    note_in_model_card,
    output_directory,
    query_means,
)

logger = logging.getLogger(__name__)

LOSS = "eval_loss"  # of lists without a name


class RerankingEvaluator:
    """Scores every document of every query in one stream and measures the order.

    Args:
        lists: whatever `load_lists` takes, the documents in the first stage's order ("base"); or
            sentence-transformers' samples: rows of query, positive and either documents (the first
            stage's order) or negative (no first stage, so no base_ metrics).
        at_k: cut of MRR and NDCG.
        name: goes before each metric's name.
        always_rerank_positives: for samples with documents: also score the positives that the first
            stage missed. False scores what it found, and a query without a positive among it counts
            0.
        metrics: further ones of ir-measures, e.g. "R@100" or "P(rel=2)@5"; each result has the name
            given here.
        batch_size: most pairs per forward pass; None lets their tokens decide.
        show_progress_bar: while scoring.
        write_csv: with an output_path, add a row of means to sentence-transformers' CSV file there.
        write_per_query: with an output_path, write the last call's values of each query as CSV.
        write_run: with an output_path, write the last call's order as a TREC run.
        loss: of raw scores (N,), labels (N,) and offsets (Q + 1,) of all lists, all on the CPU; the
            result then has it as eval_loss, or NAME_loss.

    Calling it with a model (this package's or sentence-transformers' CrossEncoder) returns
    {"map", "mrr@k", "ndcg@k"} and each with "base_" before it for the given order, as means over
    all queries. In sentence-transformers' CrossEncoderTrainer it goes in as
    evaluator=[RerankingEvaluator(...)].

    Where documents tie in score every metric is its expected value over the orders of the tie (see
    `ranking_metrics`): the order of input, which may know the labels, decides nothing. The share of
    tied preference pairs is logged. Without ties all metrics equal those of sentence-transformers'
    CrossEncoderRerankingEvaluator; with them its NDCG does, its MAP and MRR do not average.
    """

    greater_is_better = True

    def __init__(
        self,
        lists: Any,
        at_k: int = 10,
        name: str = "",
        *,
        always_rerank_positives: bool = True,
        metrics: Sequence[str] = (),
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        write_csv: bool = True,
        write_per_query: bool = False,
        write_run: bool = False,
        loss: Callable[[Tensor, Tensor, Tensor], float] | None = None,
    ) -> None:
        candidates = load_candidates(lists, always_rerank_positives=always_rerank_positives)
        self.set = MeasuredSet(candidates, name=name, at_k=at_k, metrics=metrics)
        self.at_k = at_k
        self.name = name
        self.always_rerank_positives = always_rerank_positives
        self.write_csv = write_csv
        self.write_per_query = write_per_query
        self.write_run = write_run
        self.loss = loss
        self.primary_metric = self.set.primary_metric
        self.metric_names = tuple(map(self.set.prefixed, self.set.metrics))
        self.score = PairScorer(
            self.set.pairs, batch_size=batch_size, show_progress_bar=show_progress_bar
        )

    @property
    def description(self) -> str:
        return self.set.description

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that sentence-transformers' model card shows."""
        return {"at_k": self.at_k, "always_rerank_positives": self.always_rerank_positives}

    @property
    def _stem(self) -> str:
        return "CrossEncoderRerankingEvaluator" + (
            f"_{self.name.replace('/', '_')}" if self.name else ""
        )

    def evaluate_per_query(
        self, model: Any, output_path: str | None = None
    ) -> dict[str, np.ndarray]:
        """Each metric, reranked and base_, as an array (Q,) in list order."""
        values, _ = self._measure(model, output_path)
        return values

    def _measure(
        self, model: Any, output_path: str | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The values of each query, and the scores (N,) that they are of."""
        directory = None if output_path is None else output_directory(output_path)
        scores = self.score(model)
        values = self.set.measure(scores)
        if directory is not None:
            if self.write_per_query:
                self.set.write_per_query(directory / f"{self._stem}_per_query.csv", values)
            if self.write_run:
                self.set.write_run(directory / f"{self._stem}.run", scores)
        return values, scores

    def _loss_of(self, scores: np.ndarray) -> dict[str, float]:
        if self.loss is None:
            return {}
        labels = [one.labels for one in self.set.candidates]
        offsets = torch.tensor([0, *map(len, labels)]).cumsum(0)
        flat = torch.from_numpy(np.concatenate(labels)).float()
        loss = self.loss(torch.from_numpy(scores).float(), flat, offsets)
        return {f"{self.name}_loss" if self.name else LOSS: loss}

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Means over all queries; with an output_path also the files asked for in that directory.

        Raises:
            ValueError: output_path can't be written, before anything is scored; a score is NaN.
        """
        results = None
        if output_path is not None and self.write_csv:
            results = ResultsFile(
                output_path, f"{self._stem}_results_@{self.at_k}.csv", self.set.metrics
            )
        values, scores = self._measure(model, output_path)
        means = query_means(values)
        for metric in self.set.metrics:
            if f"base_{metric}" in means:
                logger.info(
                    "%-8s base %.4f -> reranked %.4f",
                    metric,
                    means[f"base_{metric}"],
                    means[metric],
                )
            else:
                logger.info("%-8s reranked %.4f", metric, means[metric])
        if results is not None:
            results.append(epoch, steps, means)
        note_in_model_card(self, model, means, self.name, epoch, steps)
        metrics = {self.set.prefixed(name): value for name, value in means.items()}
        return {**metrics, **self._loss_of(scores)}
