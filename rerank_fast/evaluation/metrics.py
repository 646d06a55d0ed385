"""Ranking metrics through ir-measures, and a bootstrap interval of their mean."""

from __future__ import annotations

from collections.abc import Sequence

import ir_measures
import numpy as np


def ranking_metrics(
    labels: Sequence[np.ndarray], scores: Sequence[np.ndarray], *, at_k: int = 10
) -> dict[str, np.ndarray]:
    """MAP, MRR@k and NDCG@k of each list, in list order.

    A document is relevant where its label is above 0; NDCG takes the label as its gain. Ties in score keep
    the input order. A list without a relevant document counts 0.

    Args:
        labels: Q arrays (D_q,) of labels.
        scores: Q arrays (D_q,) of scores, higher is better.

    Returns:
        {"map", "mrr@k", "ndcg@k"}: float64 arrays (Q,).

    Raises:
        ValueError: a score is NaN, or a list's scores and labels differ in number; names the list.
    """
    if at_k < 1:
        raise ValueError(f"at_k must be at least 1, got {at_k}")
    measures = {
        "map": ir_measures.AP,
        f"mrr@{at_k}": ir_measures.RR @ at_k,
        f"ndcg@{at_k}": ir_measures.nDCG @ at_k,
    }
    judged: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    gains: list[np.ndarray] = []
    for q, (y, s) in enumerate(zip(labels, scores, strict=True)):
        y, s = np.asarray(y, dtype=np.float64), np.asarray(s, dtype=np.float64)
        if y.shape != s.shape:
            raise ValueError(f"list {q}: {len(y)} labels but {len(s)} scores")
        if np.isnan(s).any():
            raise ValueError(f"list {q}: the score of document {int(np.isnan(s).argmax())} is NaN")
        # The position in a stable sort stands for the score, so that no metric breaks ties its own way.
        order = np.argsort(-s, kind="stable")
        judged[str(q)] = {str(i): int(y[i] > 0) for i in range(len(y))}
        run[str(q)] = {str(i): float(len(y) - position) for position, i in enumerate(order)}
        gains.append(y)
    # trec_eval makes a table as long as the largest judgement: 1e6 bounds it.
    # Judgements are whole numbers in the field's formats. Fractional labels keep their order of relevance
    # for MAP and MRR and enter NDCG exactly, as the same ratio computed here would.
    whole = all(np.array_equal(y, np.round(y)) and (y < 1e6).all() for y in gains)
    if whole:
        for q, y in enumerate(gains):
            judged[str(q)] = {str(i): int(max(value, 0)) for i, value in enumerate(y)}
    result = {name: np.zeros(len(gains)) for name in measures}
    by_measure = {measure: name for name, measure in measures.items()}
    for metric in ir_measures.iter_calc(list(by_measure), judged, run):
        result[by_measure[metric.measure]][int(metric.query_id)] = metric.value
    if not whole:
        result[f"ndcg@{at_k}"] = np.array(
            [_ndcg(y, np.asarray(s, dtype=np.float64), at_k) for y, s in zip(gains, scores, strict=True)]
        )
    return result


def _ndcg(labels: np.ndarray, scores: np.ndarray, at_k: int) -> float:
    gains = np.maximum(labels, 0)
    discounts = 1 / np.log2(np.arange(2, len(gains) + 2))[:at_k]
    ideal = np.sort(gains)[::-1][:at_k] @ discounts
    return float(gains[np.argsort(-scores, kind="stable")][:at_k] @ discounts / ideal) if ideal > 0 else 0.0


def bootstrap_interval(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 12
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (Q,) per-query values."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected at least one value in one dimension, got shape {values.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
