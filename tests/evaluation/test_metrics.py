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


def test_nearly_tied_and_infinite_scores() -> None:
    """Distances that fp32 would lose still count."""
    labels = arrays([[0, 1], [0, 1, 0]])
    scores = arrays([[1.0, 1.0 + 1e-12], [-math.inf, math.inf, 1e300]])
    np.testing.assert_array_equal(ranking_metrics(labels, scores)["map"], [1, 1])


def test_nan_names_the_list() -> None:
    with pytest.raises(ValueError, match=r"list 1\b.*NaN"):
        ranking_metrics(arrays([[1, 0], [1, 0]]), arrays([[1, 2], [1, math.nan]]))


@pytest.mark.parametrize("label", [math.nan, math.inf, -math.inf])
def test_a_label_that_is_not_finite_names_the_list(label: float) -> None:
    with pytest.raises(
        ValueError, match=r"list 1: the label of document 1 is -?(nan|inf), not finite"
    ):
        ranking_metrics(arrays([[1, 0], [1, label]]), arrays([[1, 2], [1, 2]]))


def test_infinite_scores_are_the_extremes_and_tie_with_each_other() -> None:
    scores = [[math.inf, math.inf, -math.inf]]
    assert ranking_metrics([[1, 0, 0]], scores)["map"][0] == pytest.approx((1 + 1 / 2) / 2)
    assert ranking_metrics([[0, 0, 1]], scores)["map"][0] == pytest.approx(1 / 3)


def test_lengths_differ() -> None:
    with pytest.raises(ValueError, match=r"list 0\b"):
        ranking_metrics(arrays([[1, 0]]), arrays([[1, 2, 3]]))
    with pytest.raises(ValueError, match="labels of 2 lists but scores of 1"):
        ranking_metrics(arrays([[1, 0]] * 2), arrays([[1, 2]]))
    with pytest.raises(
        ValueError, match=r"list 0: expected one dimension, got \(1, 2\) and \(1, 2\)"
    ):
        ranking_metrics([np.zeros((1, 2))], [np.zeros((1, 2))])


def test_a_list_is_measured_by_itself() -> None:
    """Whatever stands beside it: fractional labels of one list round no other's."""
    names = ["P(rel=2)@1", "AP(rel=2)", "Rprec(rel=2)", "Bpref", "nDCG"]
    labels, scores = arrays([[3, 0], [0.5, 0], [2.5, 0], [0, 7]]), arrays([[2, 1]] * 4)
    together = ranking_metrics(labels, scores, metrics=names)
    assert together["P(rel=2)@1"].tolist() == [1, 0, 1, 0]
    assert together["Rprec(rel=2)"].tolist() == [1, 0, 1, 0]
    for q in range(4):
        alone = ranking_metrics(labels[q : q + 1], scores[q : q + 1], metrics=names)
        assert {name: values[q] for name, values in together.items()} == {
            name: values[0] for name, values in alone.items()
        }


@pytest.mark.parametrize("name", ["ERR@1", "RBP(p=0.5)", "nDCG(dcg='exp-log2')@5", "Compat"])
def test_metrics_of_grades_refuse_fractions(name: str) -> None:
    try:
        ranking_metrics([[3, 0]], [[2, 1]], metrics=[name])
    except ValueError as error:
        pytest.skip(str(error))  # its package is not installed
    with pytest.raises(
        ValueError, match=r"list 1: .+ takes grades: expected whole labels.*, got 0\.5"
    ):
        ranking_metrics([[3, 0], [0.5, 0]], [[2, 1]] * 2, metrics=[name])


def test_values_that_are_not_finite_have_no_interval() -> None:
    with pytest.raises(ValueError, match="got nan for query 1"):
        bootstrap_interval(np.array([1.0, math.nan]))


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


@pytest.mark.parametrize(
    ("values", "confidence"), [([], 0.95), ([[1.0]], 0.95), ([1.0], 0.0), ([1.0], 1.0)]
)
def test_interval_of_bad_input(values: list[float], confidence: float) -> None:
    with pytest.raises(ValueError):
        bootstrap_interval(np.array(values), confidence=confidence)
