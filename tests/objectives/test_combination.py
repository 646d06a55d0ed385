"""Objectives by name, and several added up."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from rerank_fast.objectives import NAMES, objective_class
from rerank_fast.objectives.combination import Combination, make_objective, make_objectives
from rerank_fast.objectives.lambda_loss import LambdaLoss

SCORES = torch.tensor([0.3, -1.0, 2.0, 0.5, 0.1, -0.2])
LABELS = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 0.0])
OFFSETS = torch.tensor([0, 3, 3, 6])


def units(objective, labels=LABELS, offsets=OFFSETS):
    return objective.num_units(labels.numpy(), offsets.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_that_of_its_class(name):
    kind = objective_class(name)
    assert kind.name == name
    assert make_objective(name, {}) == kind()
    assert list(kind().describe()) == [field.name for field in fields(kind)]
    assert kind().citation.strip().startswith("@")


def test_unknown_names_and_options_list_what_there_is():
    with pytest.raises(
        ValueError, match=r"unknown objective 'lambdaloss'; there are .*lambda_loss"
    ):
        make_objective("lambdaloss", {})
    with pytest.raises(
        ValueError, match="objective lambda_loss has no option 'slope'; it has scheme, k, sigma"
    ):
        make_objective("lambda_loss", {"slope": 2})
    with pytest.raises(ValueError, match="sigma must be a finite fp32 number above 0, got 'x'"):
        make_objectives([{"name": "lambda_loss", "sigma": "x"}])


def test_each_part_is_the_mean_over_its_own_units():
    settings = [
        {"name": "lambda_loss", "weight": 2.0, "scheme": "ndcg1"},
        {"name": "lambda_loss", "reduction": "lists"},
        {"name": "lambda_loss", "weight": 0.25, "reduction": "sum", "sigma": 2.0},
    ]
    several = make_objectives(settings)
    assert units(several) == (18, 3, None)
    leaf = SCORES.clone().requires_grad_()
    loss, left = several.mean(leaf, LABELS, OFFSETS, units(several))
    loss.backward()
    assert left is None
    expected, gradient = torch.zeros(()), torch.zeros_like(SCORES)
    for one, weight in zip(several.parts, several.weights, strict=True):
        own = SCORES.clone().requires_grad_()
        alone = one.mean(own, LABELS, OFFSETS, units(one)).total * weight
        alone.backward()
        expected, gradient = expected + alone.detach(), gradient + own.grad
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(leaf.grad, gradient)
    assert [one["weight"] for one in several.describe()["objectives"]] == [2.0, 1.0, 0.25]


def test_what_can_not_be_exact_or_is_no_combination_is_refused():
    with pytest.raises(
        ValueError, match="objective lambda_loss with a cut k and the mean over preference pairs"
    ):
        make_objectives([{"name": "lambda_loss", "k": 10}, {"name": "lambda_loss"}])
    make_objectives(
        [{"name": "lambda_loss", "k": 10, "reduction": "lists"}, {"name": "lambda_loss"}]
    )
    for weight in (0, -1.0, "1", float("nan")):
        with pytest.raises(
            ValueError, match="the weight of lambda_loss must be a finite fp32 number above 0"
        ):
            make_objectives([{"name": "lambda_loss", "weight": weight}])
    inner = Combination((LambdaLoss(),), (1.0,))
    with pytest.raises(ValueError, match="must not be several itself"):
        Combination((inner,), (1.0,))
    with pytest.raises(ValueError, match="a weight for each, got 1 and 2"):
        Combination((LambdaLoss(),), (1.0, 2.0))


def test_a_list_contributes_where_one_part_says_so():
    several = Combination((LambdaLoss(), LambdaLoss("ndcg1")), (1.0, 1.0))
    tied = np.ones(3, dtype=np.float32)
    assert [one.contributes(tied) for one in (*several.parts, several)] == [False, True, True]
    assert several.scores_idle
