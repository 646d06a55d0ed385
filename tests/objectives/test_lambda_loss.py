"""LambdaLoss as the training loop calls it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rerank_fast.losses import BaseWeightingScheme, NDCGLoss2PPScheme
from rerank_fast.objectives.lambda_loss import LambdaLoss
from rerank_fast.ops.lambda_loss import lambda_loss
from rerank_fast.ops.reference.lambda_loss import pair_weights

SIZES = [3, 0, 7, 1, 12]


def ragged(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(sum(SIZES), generator=generator).to(dtype)
    labels = torch.randint(0, 3, (sum(SIZES),), generator=generator).float()
    return scores, labels, torch.tensor([0, *SIZES]).cumsum(0)


class LambdaRankByHand(BaseWeightingScheme):
    """The named scheme through a forward, as a user would write it."""

    def forward(self, gain, discount, true_sorted):
        rank = torch.arange(1, gain.shape[1] + 1)
        return torch.stack([pair_weights(g, rank, scheme="lambdarank", mu=0.0) for g in gain])


def by_hand(gain, discount, true_sorted):
    return LambdaRankByHand()(gain, discount, true_sorted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("reduction", ["pairs", "lists", "sum"])
@pytest.mark.parametrize("scheme", ["lambdarank", LambdaRankByHand(), by_hand])
def test_its_mean_is_the_op_whichever_way_pairs_are_weighted(scheme, reduction, k, dtype):
    scores, labels, offsets = ragged(dtype)
    ours, theirs = (scores.clone().requires_grad_() for _ in range(2))
    objective = LambdaLoss(scheme, k=k, reduction=reduction, sigma=1.5)
    units = objective.num_units(labels.numpy(), offsets.numpy())
    loss, left = objective.mean(ours, labels, offsets, units)
    assert (left is not None) == objective.cut_by_rank == (k == 2 and reduction == "pairs")
    if left is not None:
        loss = loss * units / left
    loss.backward()
    expected = lambda_loss(
        theirs, labels, offsets, scheme="lambdarank", k=k, reduction=reduction, sigma=1.5
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ours.grad, theirs.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize("scheme", ["ndcg2pp", by_hand])
@pytest.mark.parametrize("sizes", [[], [0, 0], [1, 0, 1]])
def test_without_pairs_it_is_a_connected_zero(scheme, sizes):
    scores = torch.zeros(sum(sizes), requires_grad=True)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    total, _ = LambdaLoss(scheme)(scores, torch.ones(sum(sizes)), offsets)
    total.backward()
    assert total.item() == 0
    assert scores.grad.tolist() == [0.0] * sum(sizes)


def test_a_named_scheme_as_a_module_runs_fused():
    assert LambdaLoss(NDCGLoss2PPScheme(mu=3.0)) == LambdaLoss("ndcg2pp", mu=3.0)


@pytest.mark.parametrize(("scheme", "counts"), [("ndcg2pp", [0, 0, 2]), ("ndcg1", [0, 4, 9])])
def test_units_and_lists_that_contribute(scheme, counts):
    objective = LambdaLoss(scheme)
    lists = [np.array(values, dtype=np.float32) for values in ([], [1, 1], [1, 0, 1])]
    for labels, count in zip(lists, counts, strict=True):
        assert objective.num_units(labels, np.array([0, len(labels)])) == count
        assert objective.contributes(labels) == (count > 0)
    assert not objective.contributes(np.ones(1, dtype=np.float32))


def test_a_scheme_is_described_by_its_class_and_options():
    class Tempered(BaseWeightingScheme):
        def __init__(self):
            super().__init__()
            self.temperature = 0.5

    described = LambdaLoss(Tempered(), k=3).describe()
    assert described["scheme"].endswith("Tempered(temperature=0.5)")
    assert described["k"] == 3
    assert LambdaLoss(by_hand).describe()["scheme"] == f"{__name__}.by_hand"


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "ndcg3"},
        {"k": -1},
        {"sigma": 0},
        {"mu": -1},
        {"eps": 0},
        {"reduction": "none"},
        {"reduction_log": "e"},
    ],
)
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        LambdaLoss(**options)
