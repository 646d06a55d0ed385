"""PListMLE with weights of its own, theirs and a user's."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.cross_encoder import CrossEncoder
from sentence_transformers.cross_encoder import losses as peer_losses
from torch import Tensor, nn

from rerank_fast import losses
from rerank_fast.losses import list_mle
from tests.losses.beside_theirs import BATCHES, assert_same, loss_and_gradients, tensors


def logarithmic(mask: Tensor) -> Tensor:
    return (1 / torch.log1p(mask.cumsum(dim=1))).masked_fill(~mask, 0)


class Reciprocal(nn.Module):
    def forward(self, mask: Tensor) -> Tensor:
        return mask / torch.arange(1, mask.shape[1] + 1)


class Doubled(peer_losses.PListMLELambdaWeight):
    def forward(self, mask: Tensor) -> Tensor:
        return super().forward(mask) ** 2


@pytest.mark.parametrize(
    "weight",
    [
        peer_losses.PListMLELambdaWeight(),
        losses.PListMLELambdaWeight(logarithmic),
        peer_losses.PListMLELambdaWeight(logarithmic),
        Reciprocal(),
        Doubled(),
    ],
)
@pytest.mark.parametrize("respect_input_order", [True, False])
def test_weights_of_ones_own(model: CrossEncoder, weight: nn.Module, respect_input_order: bool):
    for batch in BATCHES["lists"]:
        options = {"lambda_weight": weight, "respect_input_order": respect_input_order}
        theirs = loss_and_gradients(peer_losses.PListMLELoss(model, **options), *tensors(*batch))
        ours = loss_and_gradients(losses.PListMLELoss(model, **options), *tensors(*batch))
        assert_same(ours, theirs, gradients=3e-5)


def test_the_default_weights_are_the_objectives_own(model: CrossEncoder):
    for module in (losses, peer_losses):
        loss = losses.PListMLELoss(model, lambda_weight=module.PListMLELambdaWeight())
        assert type(loss._objective()) is list_mle.PListMLE


def test_the_weights_module_gives_theirs():
    sizes = torch.tensor([[5], [1], [0], [300]])
    mask = torch.arange(300) < sizes
    ours, theirs = losses.PListMLELambdaWeight()(mask), peer_losses.PListMLELambdaWeight()(mask)
    assert torch.equal(ours, theirs)


def test_lists_of_one_document_give_a_zero_with_a_gradient(model: CrossEncoder):
    inputs, labels = [["a", "b"], [["c"], ["d"]]], [torch.ones(1), torch.ones(1)]
    value = losses.ListMLELoss(model)(inputs, labels)
    value.backward()
    assert value == peer_losses.ListMLELoss(model)(inputs, labels) == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize(
    ("option", "value"),
    [("lambda_weight", 3), ("respect_input_order", 1), ("respect_input_order", None)],
)
def test_options_that_are_none_are_refused(model: CrossEncoder, option: str, value: object):
    with pytest.raises(ValueError, match=f"^{option} must be"):
        losses.PListMLELoss(model, **{option: value})
