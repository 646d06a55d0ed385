"""One set of queries under evaluation: its pairs, its metrics from scores, its files."""

from __future__ import annotations

import csv
import logging
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from torch import nn

from rerank_fast.data.output_errors import writing
from rerank_fast.evaluation.candidates import Candidates
from rerank_fast.evaluation.metrics import (
    default_metrics,
    parse_metric,
    ranking_metrics,
    tied_pairs,
)
from rerank_fast.evaluation.ties import draw_order

logger = logging.getLogger(__name__)

# A share of tied preference pairs from which on it is a warning.
_MANY_TIES = 0.01


class PairScorer:
    """Scores the same pairs for one model after another, all in one stream, in batches of similar
    length.
    """

    def __init__(
        self, pairs: Sequence[tuple[str, str]], *, batch_size: int | None, show_progress_bar: bool
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.pairs = pairs
        self.batch_size = batch_size
        self.show_progress_bar = show_progress_bar
        # For the last model and all that its tokens depend on: evaluations of a run tokenise once.
        self._kept: tuple[Any, Any, Any] | None = None

    def __call__(self, model: Any) -> np.ndarray:
        """(N,) float64 raw scores: a sigmoid would round large ones to the same value and tie
        them.
        """
        options: dict[str, Any] = {
            "activation_fn": nn.Identity(),
            "show_progress_bar": self.show_progress_bar,
        }
        if self.batch_size is not None:
            options["batch_size"] = self.batch_size
        if hasattr(model, "score_tokens") and hasattr(model, "tokenization_key"):
            scores = model.score_tokens(self._tokens(model), **options).cpu()
        else:
            scores = model.predict(self.pairs, **options)
        scores = np.asarray(scores, dtype=np.float64)
        if scores.size != len(self.pairs):
            raise ValueError(
                f"expected one score for each of {len(self.pairs)} pairs, got shape {scores.shape}"
            )
        return scores.reshape(-1)

    def _tokens(self, model: Any) -> Any:
        kept = self._kept  # once: another thread may set it
        if kept is None or kept[0]() is not model or kept[1] != model.tokenization_key():
            tokens = model.tokenize(self.pairs)
            kept = self._kept = weakref.ref(model), model.tokenization_key(), tokens
        return kept[2]


class MeasuredSet:
    """Candidates under one name, and the metrics of an order of them.

    Raises:
        ValueError: at_k is below 1, or a metric is unknown.
    """

    def __init__(
        self, candidates: Sequence[Candidates], *, name: str, at_k: int, metrics: Sequence[str]
    ) -> None:
        self.candidates = candidates
        self.name = name
        self.at_k = at_k
        self.metrics = tuple(dict.fromkeys((*default_metrics(at_k), *metrics)))
        self._further = tuple(metrics)
        for metric in self.metrics:
            parse_metric(metric)
        self.pairs = [(one.query, doc) for one in candidates for doc in one.docs]
        self._bounds = np.cumsum([len(one.docs) for one in candidates])[:-1]
        self._base: dict[str, np.ndarray] | None = None  # the same for every model
        self.primary_metric = self.prefixed(f"ndcg@{at_k}")

    @property
    def description(self) -> str:
        """What sentence-transformers' model card calls such a table."""
        return "Cross Encoder Reranking"

    def prefixed(self, metric: str) -> str:
        return f"{self.name}_{metric}" if self.name else metric

    def split(self, scores: np.ndarray) -> list[np.ndarray]:
        """(N,) scores of all pairs as one array for each query."""
        return np.split(scores, self._bounds)

    def measure(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric, and base_ of the first stage (NaN for a query without one), as (Q,) arrays.

        The share of preference pairs that tie in score goes to the log, from 1 % on as a warning.
        """
        labels = [one.labels for one in self.candidates]
        split = self.split(scores)
        values = ranking_metrics(labels, split, at_k=self.at_k, metrics=self._further)
        tied = tied_pairs(labels, split)
        if tied:
            logger.log(
                logging.WARNING if tied >= _MANY_TIES else logging.INFO,
                "%s%.2f%% of the preference pairs tie in score; metrics are their means over all "
                "orders of the ties.",
                f"{self.name}: " if self.name else "",
                100 * tied,
            )
        if self._base is None:
            self._base = self._measure_base()
        return {**values, **self._base}

    def _measure_base(self) -> dict[str, np.ndarray]:
        ranked = [q for q, one in enumerate(self.candidates) if one.base_labels is not None]
        labels = [np.asarray(self.candidates[q].base_labels) for q in ranked]
        if not labels:
            return {}
        given = [-np.arange(len(values), dtype=np.float64) for values in labels]
        base = {}
        for name, values in ranking_metrics(
            labels, given, at_k=self.at_k, metrics=self._further
        ).items():
            base[f"base_{name}"] = np.full(len(self.candidates), np.nan)
            base[f"base_{name}"][ranked] = values
        return base

    def write_per_query(self, file: Path, values: dict[str, np.ndarray]) -> None:
        """One CSV row for each query: query_id, then its values."""
        with writing(file), file.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(["query_id", *values])
            for q, one in enumerate(self.candidates):
                writer.writerow([one.query_id, *(float(column[q]) for column in values.values())])

    def write_run(self, file: Path, scores: np.ndarray) -> None:
        """The order as a TREC run: query_id Q0 doc_id rank score rerank_fast.

        Scores fall strictly with rank, in fp32 too: readers sort by score and break ties by id.
        Where documents tie the run has one of the orders that the metrics are the mean over, for a
        query always the same. Whitespace and % in ids are percent-encoded; an empty id is %.
        """
        with writing(file), file.open("w", encoding="utf-8") as handle:
            for one, values in zip(self.candidates, self.split(scores), strict=True):
                query_id = _column(one.query_id)
                below = np.float32(np.inf)
                for rank, i in enumerate(draw_order(values, one.query_id), start=1):
                    score = min(np.float32(np.clip(values[i], -1e38, 1e38)), below)
                    below = np.nextafter(score, np.float32(-np.inf))
                    doc_id = _column(one.doc_ids[i])
                    handle.write(f"{query_id} Q0 {doc_id} {rank} {score!s} rerank_fast\n")


def _column(key: object) -> str:
    """An id as one column of a line; `urllib.parse.unquote` gives it back, but for %, the empty
    one.
    """
    letters = (quote(one) if one.isspace() or one == "%" else one for one in str(key))
    return "".join(letters) or "%"


def query_means(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the queries that have a value."""
    return {name: float(np.nanmean(column)) for name, column in values.items()}


def output_directory(path: str | Path) -> Path:
    """The directory, made where it is missing.

    Raises:
        ValueError: it can't be made; to be said before anything is scored.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_path {path} can't be written: {error}") from error
    return Path(path)


class ResultsFile:
    """A CSV that grows by a row at each evaluation: epoch, steps, then the metrics in capitals.

    Raises:
        ValueError: it can't be written; said before anything is scored.
    """

    def __init__(self, directory: str | Path, name: str, metrics: Sequence[str]) -> None:
        self.file = output_directory(directory) / name.replace("/", "_")
        self.metrics = metrics
        # The three that sentence-transformers writes are in capitals there; others keep their
        # spelling.
        header = ["epoch", "steps", *(metric.upper() for metric in metrics[:3]), *metrics[3:]]
        try:
            with self.file.open("a", newline="", encoding="utf-8") as handle:
                if handle.tell() == 0:
                    csv.writer(handle).writerow(header)
        except OSError as error:
            raise ValueError(f"output_path {directory} can't be written: {error}") from error

    def append(self, epoch: float, steps: int, means: dict[str, float]) -> None:
        with writing(self.file), self.file.open("a", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerow([epoch, steps, *(means[metric] for metric in self.metrics)])


def note_in_model_card(
    evaluator: Any, model: Any, means: dict[str, float], prefix: str, epoch: float, steps: int
) -> None:
    """Hand the figures to the card of sentence-transformers' CrossEncoder, as its own evaluators
    do.
    """
    card = getattr(model, "model_card_data", None)
    if card is None:
        return
    shown: dict[str, Any] = {}
    for name, value in means.items():
        if not name.startswith("base_"):
            base = means.get(f"base_{name}")
            text = value if base is None else f"{value:.4f} ({value - base:+.4f})"
            shown[f"{prefix}_{name}" if prefix else name] = text
    card.set_evaluation_metrics(evaluator, shown, epoch, steps)
