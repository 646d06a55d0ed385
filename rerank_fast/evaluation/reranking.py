"""Reranking evaluation: MAP, MRR@k and NDCG@k of a model's order beside the given one."""

from __future__ import annotations

import csv
import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rerank_fast.data.lists import Source, load_lists
from rerank_fast.evaluation.metrics import ranking_metrics

logger = logging.getLogger(__name__)


class RerankingEvaluator:
    """Scores every document of every list and measures the order.

    Args:
        lists: whatever `load_lists` takes; the documents' order is the first stage's ("base").
        at_k: cut of MRR and NDCG.
        name: goes before each metric's name.
        batch_size: pairs per forward pass.
        show_progress_bar: while scoring.

    Calling it with a model (this package's or sentence-transformers' CrossEncoder) returns
    {"map", "mrr@k", "ndcg@k"} and the same with "base_" for the given order, as means over all lists.
    """

    def __init__(
        self,
        lists: Source,
        at_k: int = 10,
        name: str = "",
        *,
        batch_size: int = 64,
        show_progress_bar: bool = False,
    ) -> None:
        if at_k < 1:
            raise ValueError(f"at_k must be at least 1, got {at_k}")
        dataset = load_lists(lists)
        self.at_k = at_k
        self.name = name
        self.batch_size = batch_size
        self.show_progress_bar = show_progress_bar
        self.primary_metric = self._prefixed(f"ndcg@{at_k}")
        self.labels = [np.asarray(values) for values in dataset["labels"]]
        self.pairs = [
            (query, doc) for query, docs in zip(dataset["query"], dataset["docs"], strict=True) for doc in docs
        ]
        self._bounds = np.cumsum([len(values) for values in self.labels])[:-1]
        # Token ids for the last model and max_length seen: an evaluation every few hundred steps tokenises once.
        self._tokens: tuple[Any, int, Any] | None = None

    def _prefixed(self, metric: str) -> str:
        return f"{self.name}_{metric}" if self.name else metric

    def _scores(self, model: Any) -> list[np.ndarray]:
        # Raw scores: a sigmoid would round large ones to the same value and tie them.
        if hasattr(model, "score_tokens") and hasattr(model, "tokenize"):
            if self._tokens is None or self._tokens[0]() is not model or self._tokens[1] != model.max_length:
                self._tokens = weakref.ref(model), model.max_length, model.tokenize(self.pairs)
            scores = model.score_tokens(
                self._tokens[2],
                batch_size=self.batch_size,
                activation_fn=nn.Identity(),
                show_progress_bar=self.show_progress_bar,
            ).cpu()
        else:
            scores = model.predict(
                self.pairs,
                batch_size=self.batch_size,
                activation_fn=nn.Identity(),
                show_progress_bar=self.show_progress_bar,
            )
        scores = np.asarray(scores, dtype=np.float64)
        if scores.size != len(self.pairs):
            raise ValueError(f"expected one score for each of {len(self.pairs)} pairs, got shape {scores.shape}")
        return np.split(scores.reshape(-1), self._bounds)

    def evaluate_per_query(self, model: Any) -> dict[str, np.ndarray]:
        """Each metric, reranked and base_, as an array (Q,) in list order."""
        reranked = ranking_metrics(self.labels, self._scores(model), at_k=self.at_k)
        given = [-np.arange(len(values), dtype=np.float64) for values in self.labels]
        base = ranking_metrics(self.labels, given, at_k=self.at_k)
        return {**reranked, **{f"base_{name}": values for name, values in base.items()}}

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Means over all lists; with an output_path also a row of a CSV file in that directory.

        Raises:
            ValueError: output_path can't be written, before anything is scored; a score is NaN.
        """
        file = None if output_path is None else self._csv_file(Path(output_path))
        means = {name: float(values.mean()) for name, values in self.evaluate_per_query(model).items()}
        metrics = ("map", f"mrr@{self.at_k}", f"ndcg@{self.at_k}")
        for metric in metrics:
            logger.info("%-8s base %.4f -> reranked %.4f", metric, means[f"base_{metric}"], means[metric])
        if file is not None:
            with file.open("a", newline="", encoding="utf-8") as handle:
                csv.writer(handle).writerow([epoch, steps, *(means[metric] for metric in metrics)])
        return {self._prefixed(name): value for name, value in means.items()}

    def _csv_file(self, directory: Path) -> Path:
        """The results file, with its header."""
        infix = f"_{self.name.replace('/', '_')}" if self.name else ""
        file = directory / f"CrossEncoderRerankingEvaluator{infix}_results_@{self.at_k}.csv"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with file.open("a", newline="", encoding="utf-8") as handle:
                if handle.tell() == 0:
                    csv.writer(handle).writerow(["epoch", "steps", "MAP", f"MRR@{self.at_k}", f"NDCG@{self.at_k}"])
        except OSError as error:
            raise ValueError(f"output_path {directory} can't be written: {error}") from error
        return file
