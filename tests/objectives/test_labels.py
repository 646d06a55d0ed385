"""Options and labels that an objective refuses, or has a word on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rerank_fast.objectives.adr_mse import ADRMSE
from rerank_fast.objectives.approx_ndcg import ApproxNDCG
from rerank_fast.objectives.binary_cross_entropy import BinaryCrossEntropy
from rerank_fast.objectives.infonce import InfoNCE
from rerank_fast.objectives.listmle import ListMLE
from rerank_fast.objectives.listnet import ListNet
from rerank_fast.objectives.margin_mse import MarginMSE
from rerank_fast.objectives.mse import MSE
from rerank_fast.objectives.ranknet import RankNet


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (MSE, {"reduction": "mean"}, "reduction must be one of .'documents', 'list_means'.*'mean'"),
        (BinaryCrossEntropy, {"reduction": "lists"}, "reduction must be one of"),
        (BinaryCrossEntropy, {"pos_weight": 0}, "pos_weight must be .* above 0, got 0"),
        (MarginMSE, {"pairs": "both"}, "pairs must be one of .'positive', 'all'.*'both'"),
        (MarginMSE, {"reduction": "documents"}, "reduction must be one of .'pairs', 'list_means'"),
        (ListNet, {"temperature": 0.0}, "temperature must be .* above 0, got 0.0"),
        (ListNet, {"label_temperature": math.nan}, "label_temperature must be"),
        (ListNet, {"kl": 1}, "kl must be True or False, got 1"),
        (ListMLE, {"respect_input_order": "no"}, "respect_input_order must be True or False"),
        (InfoNCE, {"temperature": -1}, "temperature must be"),
        (RankNet, {"k": -1}, "k must be None or a whole number"),
        (RankNet, {"reduction": "none"}, "reduction must be one of .'pairs', 'lists'"),
        (RankNet, {"reduction_log": "e"}, "reduction_log must be one of"),
        (ADRMSE, {"alpha": 0}, "alpha must be .* above 0, got 0"),
        (ADRMSE, {"reduction": "sum"}, "reduction must be one of"),
        (ApproxNDCG, {"alpha": True}, "alpha must be .* above 0, got True"),
        (InfoNCE, {"positives": "all"}, "positives must be one of .'each', 'any'"),
    ],
)
def test_options_are_checked_where_they_are_given(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("objective", "labels", "message"),
    [
        (BinaryCrossEntropy(), [0, 1, 2], "binary_cross_entropy takes labels from 0 to 1, got 2:"),
        (BinaryCrossEntropy(), [-0.5, 1], "from 0 to 1, got -0.5"),
        (BinaryCrossEntropy(), [math.nan, 1], "from 0 to 1, got nan"),
        (MarginMSE(), [1], "at least one negative, got 1 document$"),
        (MarginMSE(), [], "at least one negative, got 0 documents$"),
        (InfoNCE(), [0, 0, -2], "at least one positive, .*3 labels .* largest is 0"),
    ],
)
def test_labels_that_do_not_fit_are_errors(objective, labels, message):
    with pytest.raises(ValueError, match=message):
        objective.check(np.array(labels, dtype=np.float32))


@pytest.mark.parametrize(
    ("objective", "labels"),
    [
        (BinaryCrossEntropy(), [0, 0.25, 1]),
        (MarginMSE(), [3.5, -1]),
        (MarginMSE(pairs="all"), [3.5]),
        (InfoNCE(), [0, 1]),
        (InfoNCE(), []),
        (MSE(), [3, -1]),
    ],
)
def test_labels_that_fit_are_none(objective, labels):
    objective.check(np.array(labels, dtype=np.float32))


@pytest.mark.parametrize("objective", [MSE(), MarginMSE()])
def test_a_loss_that_distils_has_a_word_on_binary_labels(objective):
    labels = np.array([0, 1, 0, 0] * 300, dtype=np.float32)
    said = objective.advice(labels)
    assert "all 1,200 labels are 0 or 1 (300 are 1, 25.0%)" in said
    assert objective.name in said
    assert objective.advice(labels * 3.5) is None
    assert objective.advice(labels[:0]) is None


def test_a_loss_of_relevance_has_a_word_on_raw_scores():
    labels = np.array([-11.25, 3.5, -2, 10], dtype=np.float32)
    for objective in (InfoNCE(), ApproxNDCG()):
        assert "2 of 4 labels are below 0 (from -11.2 to 10)" in objective.advice(labels)
    assert InfoNCE().advice(np.array([0, 1, 4])) is None
    assert BinaryCrossEntropy().advice(labels) is None  # which refuses them


@pytest.mark.parametrize(
    ("objective", "contribute", "idle"),
    [
        (MSE(), [[0], [1, 1]], [[]]),
        (BinaryCrossEntropy(), [[0], [1, 1]], [[]]),
        (MarginMSE(), [[1, 1]], [[], [1]]),
        (ListNet(), [[1, 1]], [[], [1]]),
        (ListMLE(), [[1, 0]], [[], [1]]),
        (RankNet(), [[1, 0]], [[], [1], [2, 2]]),
        (ADRMSE(), [[1, 1]], [[], [1]]),
        (ApproxNDCG(), [[1, 1], [0, 2]], [[], [1], [0, -1]]),
        (InfoNCE(), [[1, 0], [2, 1, -1]], [[], [1], [1, 2], [0, -1]]),
    ],
)
def test_which_lists_contribute(objective, contribute, idle):
    assert all(objective.contributes(np.array(labels)) for labels in contribute)
    assert not any(objective.contributes(np.array(labels)) for labels in idle)


def test_what_is_counted_is_named():
    labels, offsets = np.zeros(9), np.array([0, 4, 4, 9])
    for objective, unit, count in (
        (MSE(), "documents", 9),
        (MSE(reduction="list_means"), "lists", 3),
        (MarginMSE(), "pairs", 3 + 4),
        (MarginMSE(pairs="all"), "pairs", 6 + 10),
        (MarginMSE(reduction="list_means"), "lists", 3),
        (ListNet(), "lists", 3),
    ):
        assert (objective.unit, objective.num_units(labels, offsets)) == (unit, count)
