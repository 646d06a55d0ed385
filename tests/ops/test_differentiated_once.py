"""Second derivatives through an op raise, also where the first gradient is no part of a graph."""

from __future__ import annotations

import pytest
import torch

from rerank_fast.model.packed.linear import _NarrowLinear
from rerank_fast.ops.lambda_loss import lambda_loss
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.score_head import score_head
from rerank_fast.ops.varlen_attention import varlen_attention


def of_loss(x):
    return lambda_loss(x[:, 0], torch.tensor([1.0, 0, 2, 0, 1, 0]), torch.tensor([0, 4, 6]))


def of_attention(x):
    q = x.unflatten(1, (2, 4))
    ends = torch.tensor([0, 4, 6], dtype=torch.int32)
    return varlen_attention(q, q, q, ends, ends)


def of_norm(x):
    return residual_norm(x, x, torch.ones(8), torch.zeros(8), eps=1e-5)[0]


def of_head(x):
    return score_head(x, None, torch.eye(8), None, torch.ones(1, 8), None)


def of_product(x):
    weight = torch.eye(8, requires_grad=True)
    return _NarrowLinear.apply(x.bfloat16(), weight.detach().bfloat16(), None, weight)


OPS = [of_loss, of_attention, of_norm, of_head, of_product]


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_can_not_be_differentiated(op):
    """As in a gradient penalty: nothing above the op has a graph, its inputs have."""
    one, other = (torch.linspace(0.5, 1.5, 48).view(6, 8).requires_grad_() for _ in range(2))
    (grad,) = torch.autograd.grad(op(one * other).float().sum(), one, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not known"):
        torch.autograd.grad(grad.square().sum(), other)


@pytest.mark.parametrize("op", OPS)
def test_create_graph_alone_changes_no_gradient(op):
    x = torch.linspace(0.5, 1.5, 48).view(6, 8).requires_grad_()
    plain, graphed = (
        torch.autograd.grad(op(x).float().square().sum(), x, create_graph=graph)[0]
        for graph in (False, True)
    )
    assert torch.equal(plain, graphed)
