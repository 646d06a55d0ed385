"""Clipping takes gradients that are all of one tensor as this one, and gives what torch's gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rerank_fast.training.clipping import clip_gradients


def make(given: str) -> list[nn.Parameter]:
    """Weights whose gradients lie as named; the first has none."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(12, 3, generator=generator)
    parts = list(whole.split([4, 4, 4]))
    if given == "some of a tensor":
        parts = parts[:2]
    elif given == "of other shapes":
        parts = [whole[:8].view(3, 8), whole[8:].flatten()]
    elif given == "transposed":
        parts = [whole.t()]
    gradients = [*parts, torch.randn(5, generator=generator)]
    weights = [nn.Parameter(torch.zeros(one.shape)) for one in (torch.zeros(2), *gradients)]
    for weight, gradient in zip(weights[1:], gradients, strict=True):
        weight.grad = gradient
    return weights


CASES = ("all of a tensor", "some of a tensor", "of other shapes", "transposed")


@pytest.mark.parametrize("limit", [0.5, 100.0, math.inf])
@pytest.mark.parametrize("given", CASES)
def test_it_is_torchs(given: str, limit: float):
    weights, expected = make(given), make(given)
    norm = clip_gradients(iter(weights), limit)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(expected, limit), rtol=1e-6, atol=0)
    for one, other in zip(weights[1:], expected[1:], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-6, atol=0)
    assert weights[0].grad is None


@pytest.mark.parametrize(("given", "tensors"), list(zip(CASES, (2, 3, 2, 2), strict=True)))
def test_parts_are_taken_as_one(given: str, tensors: int, monkeypatch: pytest.MonkeyPatch):
    taken: list[Tensor] = []
    norms = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda many: (taken.extend(many), norms(many))[1])
    clip_gradients(make(given), 1.0)
    assert len(taken) == tensors


def test_what_is_not_a_gradient_stays():
    weights = make("some of a tensor")
    rest = weights[1].grad._base[8:].clone()
    clip_gradients(weights, 0.1)
    assert torch.equal(weights[1].grad._base[8:], rest)


def test_without_gradients_the_norm_is_0():
    assert clip_gradients([nn.Parameter(torch.ones(2))], 1.0) == 0


def test_a_norm_that_is_no_number_is_said():
    weights = make("all of a tensor")
    weights[1].grad[0, 0] = math.nan
    assert clip_gradients(weights, 1.0).isnan()
