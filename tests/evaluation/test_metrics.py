"""Ranking metrics against hand-computed values; the bootstrap interval."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rerank_fast.evaluation import bootstrap_interval, ranking_metrics


def arrays(lists: list[list[float]]) -> list[np.ndarray]:
    return [np.array(values, dtype=np.float64) for values in lists]


def test_hand_computed() -> None:
    # Relevant at ranks 2 and 4; at rank 1; nowhere; the only document.
    labels = arrays([[0, 1, 1, 0], [1, 0], [0, 0, 0], [1]])
    scores = arrays([[4, 1, 3, 2], [0.2, 0.1], [1, 2, 3], [-7]])
    result = ranking_metrics(labels, scores, at_k=3)
    dcg = 1 / math.log2(3)
    np.testing.assert_allclose(result["map"], [(1 / 2 + 2 / 4) / 2, 1, 0, 1], rtol=1e-12)
    np.testing.assert_allclose(result["mrr@3"], [1 / 2, 1, 0, 1], rtol=1e-12)
    np.testing.assert_allclose(result["ndcg@3"], [dcg / (1 + dcg), 1, 0, 1], rtol=1e-12)


def test_cut() -> None:
    labels, scores = arrays([[0, 0, 1]]), arrays([[3, 2, 1]])
    result = ranking_metrics(labels, scores, at_k=2)
    assert result["mrr@2"][0] == 0
    assert result["ndcg@2"][0] == 0
    assert result["map"][0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("scale", [1, 0.5, 0.3])
def test_labels_are_linear_gains(scale: float) -> None:
    """Whole and fractional labels in the same proportion have the same NDCG."""
    labels = [np.array([3, 0, 1, 2]) * scale]
    result = ranking_metrics(labels, arrays([[1, 4, 3, 2]]), at_k=10)
    dcg = 1 / math.log2(3) + 2 / math.log2(4) + 3 / math.log2(5)
    ideal = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert result["ndcg@10"][0] == pytest.approx(dcg / ideal, rel=1e-12)
    assert result["map"][0] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, rel=1e-12)
    assert result["mrr@10"][0] == 0.5


def test_labels_below_zero_are_not_relevant() -> None:
    below = ranking_metrics(arrays([[-2, 1, -0.0]]), arrays([[3, 2, 1]]))
    zero = ranking_metrics(arrays([[0, 1, 0]]), arrays([[3, 2, 1]]))
    assert {name: values.tolist() for name, values in below.items()} == {
        name: values.tolist() for name, values in zero.items()
    }


@pytest.mark.parametrize("size", [2, 12, 300])
def test_ties_keep_the_input_order(size: int) -> None:
    first, last = np.zeros(size), np.zeros(size)
    first[0] = last[-1] = 1
    result = ranking_metrics([first, last], [np.zeros(size)] * 2, at_k=size)
    np.testing.assert_allclose(result[f"mrr@{size}"], [1, 1 / size])
    np.testing.assert_allclose(result["map"], [1, 1 / size])
    np.testing.assert_allclose(result[f"ndcg@{size}"], [1, 1 / math.log2(size + 1)])


def test_nearly_tied_and_infinite_scores() -> None:
    """Distances that fp32 would lose still count."""
    labels = arrays([[0, 1], [0, 1, 0]])
    scores = arrays([[1.0, 1.0 + 1e-12], [-math.inf, math.inf, 1e300]])
    np.testing.assert_array_equal(ranking_metrics(labels, scores)["map"], [1, 1])


def test_nan_names_the_list() -> None:
    with pytest.raises(ValueError, match=r"list 1\b.*NaN"):
        ranking_metrics(arrays([[1, 0], [1, 0]]), arrays([[1, 2], [1, math.nan]]))


def test_lengths_differ() -> None:
    with pytest.raises(ValueError, match=r"list 0\b"):
        ranking_metrics(arrays([[1, 0]]), arrays([[1, 2, 3]]))


@pytest.mark.parametrize("at_k", [0, -1])
def test_cut_below_one(at_k: int) -> None:
    with pytest.raises(ValueError, match="at_k"):
        ranking_metrics(arrays([[1]]), arrays([[1]]), at_k=at_k)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.normal(size=100), resamples=300) for _ in range(200)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.99


def test_interval_width_seed_and_constant_values() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize(("values", "confidence"), [([], 0.95), ([[1.0]], 0.95), ([1.0], 0.0), ([1.0], 1.0)])
def test_interval_of_bad_input(values: list[float], confidence: float) -> None:
    with pytest.raises(ValueError):
        bootstrap_interval(np.array(values), confidence=confidence)
