"""Ranking metrics by ir-measures' names, and what a difference between two models is worth."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import ir_measures
import numpy as np
from numpy.typing import ArrayLike

from rerank_fast.evaluation.ties import Ranking, count_preference_pairs, draw_order, exact_form

# Drawn for a list with ties where a metric's expected value has no exact form here.
_ORDERS = 100
# trec_eval makes a table as long as the largest judgement.
_LARGEST_GRADE = 1_000_000

Measured: TypeAlias = tuple[np.ndarray, np.ndarray]  # a list's labels and scores


def default_metrics(at_k: int) -> tuple[str, str, str]:
    """map, mrr@k and ndcg@k: what sentence-transformers' evaluators report."""
    if at_k < 1:
        raise ValueError(f"at_k must be at least 1, got {at_k}")
    return "map", f"mrr@{at_k}", f"ndcg@{at_k}"


def parse_metric(name: str) -> Any:
    """The ir-measures measure of a name such as ndcg@10, R@100, P(rel=2)@5 or RBP(p=0.8), in any
    letter case.

    Raises:
        ValueError: no such measure (lists those that there are), or its arguments or package are
            wrong.
    """
    registry = ir_measures.measures.registry
    # Aliases differ from their measure in case alone: either spelling of a lower-case name is the
    # same measure.
    known = {measure.lower(): measure for measure in registry}
    found = re.match(r"\s*(\w+)", name)
    measure_name = known.get(found[1].lower()) if found else None
    if found is None or measure_name is None:
        raise ValueError(
            f"unknown metric {name!r}; there are {', '.join(sorted(registry, key=str.lower))}"
        )
    try:
        measure = ir_measures.parse_measure(measure_name + name[found.end() :])
        ir_measures.evaluator([measure], {"q": {"d": 1}})
    except Exception as error:  # of as many kinds as there are providers
        raise ValueError(
            f"metric {name!r} can't be computed (a cut is written as in nDCG@10): {error}"
        ) from error
    return measure


def ranking_metrics(
    labels: Sequence[ArrayLike],
    scores: Sequence[ArrayLike],
    *,
    at_k: int = 10,
    metrics: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """MAP, MRR@k, NDCG@k and further metrics of each list, in list order, each list by itself.

    A document is relevant where its label is above 0, or at least rel where a metric names one
    above 1; NDCG takes the label as its gain. A list without a relevant document counts 0.

    Documents that tie in score have no order: a metric is its expected value over all orders of
    the ties, whatever the order of input. That is exact for AP (MAP), RR (MRR), nDCG, P, R and
    Success, with a cut and a rel. Any other metric is the mean over 100 orders, drawn with a fixed
    seed, where a tie holds different labels: the standard error of a list's value is at most 0.05
    for a metric between 0 and 1. `tied_pairs` says how much scores leave open.

    Args:
        labels: Q sequences (D_q,) of finite labels, binary, graded or fractional.
        scores: Q sequences (D_q,) of scores, higher is better; infinite ones are the extremes.
        at_k: cut of MRR and NDCG.
        metrics: further ones, as `parse_metric` reads them.

    Returns:
        Arrays (Q,) of float64 by name, which are map, mrr@k, ndcg@k and the further ones.

    Raises:
        ValueError: a score is NaN, a label is not finite, or a list's scores and labels differ in
            number; names the list. A metric is unknown, or takes grades (ERR and others, but not
            NDCG) where a list has fractional labels.
    """
    names_of: dict[Any, list[str]] = {}
    for name in dict.fromkeys((*default_metrics(at_k), *metrics)):
        names_of.setdefault(parse_metric(name), []).append(name)
    lists = check_lists(labels, scores)
    forms = {measure: exact_form(measure) for measure in names_of}
    rankings = [Ranking(s) for _, s in lists]
    values = {}
    for measure, form in forms.items():
        if form is not None:
            each = (form(ranking, y) for ranking, (y, _) in zip(rankings, lists, strict=True))
            values[measure] = np.fromiter(each, dtype=np.float64, count=len(lists))
    others = {measure: names[0] for measure, names in names_of.items() if measure not in values}
    if others:
        values |= _drawn(others, lists)
    return {name: values[measure] for measure, names in names_of.items() for name in names}


def tied_pairs(labels: Sequence[ArrayLike], scores: Sequence[ArrayLike]) -> float:
    """The share of preference pairs that tie in score, over all lists; 0 without such pairs.

    A preference pair is two documents of one list with different labels; labels below 0 count as 0.
    A model that gives every document of a list the same score has a share of 1.

    Raises:
        ValueError: as `ranking_metrics`.
    """
    counts = [count_preference_pairs(np.maximum(y, 0), s) for y, s in check_lists(labels, scores)]
    tied, total = np.sum(counts, axis=0) if counts else (0, 0)
    return float(tied / max(total, 1))


def check_lists(labels: Sequence[ArrayLike], scores: Sequence[ArrayLike]) -> list[Measured]:
    """Labels and scores of each list as float64 arrays (D_q,).

    Raises:
        ValueError: they differ in number, a score is NaN or a label is not finite; names the list.
    """
    if len(labels) != len(scores):
        raise ValueError(f"got labels of {len(labels)} lists but scores of {len(scores)}")
    lists: list[Measured] = []
    for q, (y, s) in enumerate(zip(labels, scores, strict=True)):
        y, s = _numbers(y, f"list {q}: the labels"), _numbers(s, f"list {q}: the scores")
        if y.ndim != 1 or s.ndim != 1:
            raise ValueError(f"list {q}: expected one dimension, got {y.shape} and {s.shape}")
        if y.shape != s.shape:
            raise ValueError(f"list {q}: {len(y)} labels but {len(s)} scores")
        if np.isnan(s).any():
            raise ValueError(f"list {q}: the score of document {int(np.isnan(s).argmax())} is NaN")
        if not np.isfinite(y).all():
            i = int((~np.isfinite(y)).argmax())
            raise ValueError(f"list {q}: the label of document {i} is {y[i]}, not finite")
        lists.append((y, s))
    return lists


def _numbers(values: ArrayLike, what: str) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} are no numbers: {error}") from error


def _drawn(names: Mapping[Any, str], lists: Sequence[Measured]) -> dict[Any, np.ndarray]:
    """Measures through ir-measures, each list's the mean over orders of its ties."""
    judged: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    lists_of: list[int] = []  # by key, a number: gdeval takes no other
    for q, (y, s) in enumerate(lists):
        odd = y[(y > 0) & ((y != np.round(y)) | (y >= _LARGEST_GRADE))]
        for measure, name in names.items() if len(odd) else ():
            if "rel" not in measure.SUPPORTED_PARAMS or not isinstance(measure["rel"], int):
                expected = f"whole labels below {_LARGEST_GRADE}, got {odd[0]}"
                raise ValueError(f"list {q}: {name} takes grades: expected {expected}")
        # The field's formats have whole numbers. Rounded so, what is relevant stays relevant.
        grades = np.clip(np.floor(y), y > 0, _LARGEST_GRADE).astype(int).tolist()
        judgements = {str(i): grade for i, grade in enumerate(grades)}
        for draw in range(_ORDERS if count_preference_pairs(np.maximum(y, 0), s)[0] else 1):
            key = str(len(lists_of))
            lists_of.append(q)
            judged[key] = judgements
            # The rank stands for the score, so that no metric breaks ties its own way.
            order = draw_order(s, draw)
            run[key] = {str(i): float(len(y) - rank) for rank, i in enumerate(order.tolist())}
    sums = {measure: np.zeros(len(lists)) for measure in names}
    try:
        for metric in ir_measures.iter_calc(list(names), judged, run):
            sums[metric.measure][lists_of[int(metric.query_id)]] += metric.value
    except subprocess.CalledProcessError as error:  # a measure that another program computes
        listed = ", ".join(names.values())
        raise ValueError(f"{listed} can't be computed for these labels: {error}") from error
    counts = np.bincount(np.asarray(lists_of, dtype=int), minlength=len(lists))
    return {measure: total / counts for measure, total in sums.items()}


def bootstrap_interval(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 12
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (Q,) per-query values."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected at least one value in one dimension, got shape {values.shape}")
    if not np.isfinite(values).all():
        q = int((~np.isfinite(values)).argmax())
        raise ValueError(f"expected finite values, got {values[q]} for query {q}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    generator = np.random.default_rng(seed)
    means = [
        values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)
    ]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same queries: means, their difference b - a, its interval and the test's
    p-value.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float


def compare(
    a: np.ndarray,
    b: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 12,
) -> Comparison:
    """Fisher's randomisation test (two-sided) of paired (Q,) per-query values, and a bootstrap
    interval of b - a.

    The test that Smucker, Allan and Carterette (CIKM 2007) found to fit retrieval best: under the
    null hypothesis each query's two values could as well be the other way around.
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
    return Comparison(
        float(a.mean()), float(b.mean()), float((b - a).mean()), low, high, float(p_value)
    )
