"""Ranking metrics by name through ir-measures, and what a difference between two models is worth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
import numpy as np


def default_metrics(at_k: int) -> tuple[str, str, str]:
    """map, mrr@k and ndcg@k: what sentence-transformers' evaluators report."""
    if at_k < 1:
        raise ValueError(f"at_k must be at least 1, got {at_k}")
    return "map", f"mrr@{at_k}", f"ndcg@{at_k}"


def parse_metric(name: str) -> Any:
    """The ir-measures measure of a name such as ndcg@10, R@100, P(rel=2)@5 or RBP(p=0.8), in any letter case.

    Raises:
        ValueError: no such measure (lists those that there are), or its arguments or package are wrong.
    """
    registry = ir_measures.measures.registry
    # Aliases differ from their measure in case alone: either spelling of a lower-case name is the same measure.
    known = {measure.lower(): measure for measure in registry}
    found = re.match(r"\s*(\w+)", name)
    measure_name = known.get(found[1].lower()) if found else None
    if found is None or measure_name is None:
        raise ValueError(f"unknown metric {name!r}; there are {', '.join(sorted(registry, key=str.lower))}")
    try:
        measure = ir_measures.parse_measure(measure_name + name[found.end() :])
        ir_measures.evaluator([measure], {"q": {"d": 1}})
    except Exception as error:  # of as many kinds as there are providers
        raise ValueError(f"metric {name!r} can't be computed (a cut is written as in nDCG@10): {error}") from error
    return measure


def ranking_metrics(
    labels: Sequence[np.ndarray], scores: Sequence[np.ndarray], *, at_k: int = 10, metrics: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """MAP, MRR@k, NDCG@k and further metrics of each list, in list order.

    A document is relevant where its label is above 0; NDCG takes the label as its gain. Ties in score keep
    the input order. A list without a relevant document counts 0. Where a label is fractional, NDCG is exact and
    every other metric sees relevant or not.

    Args:
        labels: Q arrays (D_q,) of labels.
        scores: Q arrays (D_q,) of scores, higher is better.
        metrics: further ones, as `parse_metric` reads them.

    Returns:
        {"map", "mrr@k", "ndcg@k" and the further names}: float64 arrays (Q,).

    Raises:
        ValueError: a score is NaN, or a list's scores and labels differ in number; names the list. A metric is
            unknown.
    """
    names_of: dict[Any, list[str]] = {}
    for name in dict.fromkeys((*default_metrics(at_k), *metrics)):
        names_of.setdefault(parse_metric(name), []).append(name)
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
    values = {measure: np.zeros(len(gains)) for measure in names_of}
    for metric in ir_measures.iter_calc(list(names_of), judged, run):
        values[metric.measure][int(metric.query_id)] = metric.value
    for measure in names_of:
        if not whole and measure.NAME == "nDCG" and set(measure.params) <= {"cutoff"}:
            k = measure.params.get("cutoff")
            values[measure] = np.array(
                [_ndcg(y, np.asarray(s, dtype=np.float64), k) for y, s in zip(gains, scores, strict=True)]
            )
    return {name: values[measure] for measure, names in names_of.items() for name in names}


def _ndcg(labels: np.ndarray, scores: np.ndarray, at_k: int | None) -> float:
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


@dataclass(frozen=True)
class Comparison:
    """Two models on the same queries: means, their difference b - a, its interval and the test's p-value."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float


def compare(
    a: np.ndarray, b: np.ndarray, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 12
) -> Comparison:
    """Fisher's randomisation test (two-sided) of paired (Q,) per-query values, and a bootstrap interval of b - a.

    The test that Smucker, Allan and Carterette (CIKM 2007) found to fit retrieval best: under the null
    hypothesis each query's two values could as well be the other way around.
    """
    from scipy.stats import permutation_test

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"expected values of the same queries, got shapes {a.shape} and {b.shape}")
    low, high = bootstrap_interval(b - a, confidence=confidence, seed=seed)
    if not np.any(b - a):
        p_value = 1.0
    else:
        p_value = permutation_test(
            (a, b),
            lambda x, y, axis: np.mean(y - x, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            batch=1000,
            rng=np.random.default_rng(seed),
        ).pvalue
    return Comparison(float(a.mean()), float(b.mean()), float((b - a).mean()), low, high, float(p_value))
