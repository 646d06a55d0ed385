"""gradient_cache=True: the gradient that is without it, in memory that does not grow with the
batch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.cross_encoder import CrossEncoder
from torch import nn

from rerank_fast import losses
from rerank_fast.model.gradient_cache import CachedScores
from rerank_fast.model.packed.encoder import PackedPairs
from tests.losses.beside_theirs import (
    BATCHES,
    CASES,
    DOCUMENTS,
    LABELS,
    QUERIES,
    Case,
    assert_same,
    loss_and_gradients,
    tensors,
)

CACHING = [case for case in CASES if case.name != "CachedMultipleNegativesRankingLoss"]
BY_NAME = pytest.mark.parametrize("case", CACHING, ids=lambda case: case.name)
BY_PACKED = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])


@pytest.fixture
def dropping(directory: str) -> CrossEncoder:
    """A model whose dropout is at work."""
    torch.manual_seed(0)
    return CrossEncoder(directory, num_labels=1, device="cpu").train()


@BY_NAME
@BY_PACKED
def test_the_gradient_is_that_without_it_with_dropout(
    case: Case, packed: bool, dropping: CrossEncoder
):
    for batch in BATCHES[case.takes]:
        results, drawn = [], []
        for cached in (False, True):
            loss = case.make(dropping, packed=packed, mini_batch_size=3, gradient_cache=cached)
            results.append(loss_and_gradients(loss, *tensors(*batch)))
            drawn.append(torch.rand(1))
        assert_same(results[1], results[0], value=1e-6, gradients=1e-6)
        assert torch.equal(*drawn)  # the next batch's dropout is the same too
    # Dropout is at work: without the first run's random numbers the gradient would be another.
    inputs, labels = tensors(*batch)
    values = [case.make(dropping, packed=packed)(inputs, labels) for _ in range(2)]
    assert not torch.equal(*values)


class Held:
    """What autograd keeps of a tensor for backward, counted while it is alive."""

    live = peak = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        Held.live += self.size
        Held.peak = max(Held.peak, Held.live)

    def __del__(self) -> None:
        Held.live -= self.size


def peak(loss: nn.Module, inputs: list[Any], labels: Any) -> int:
    """Most bytes that autograd held at once for a batch's backward pass."""
    Held.live = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        loss(inputs, labels).sum().backward()
    return Held.peak


@BY_NAME
@BY_PACKED
def test_memory_does_not_grow_with_the_batch(case: Case, packed: bool, dropping: CrossEncoder):
    columns, labels = BATCHES[case.takes][-1]
    columns = {name: [c[0]] * 4 for name, c in columns.items()}
    labels = None if labels is None else [labels[0]] * 4
    peaks = {}
    for cached in (False, True):
        loss = case.make(dropping, packed=packed, mini_batch_size=4, gradient_cache=cached)
        for times in (1, 8):
            batch = tensors({n: c * times for n, c in columns.items()}, labels and labels * times)
            peaks[cached, times] = peak(loss, *batch)
    assert peaks[True, 8] < 1.1 * peaks[True, 1]
    assert peaks[False, 8] > 4 * peaks[False, 1]


def test_without_a_mini_batch_size_it_is_bounded_too(
    dropping: CrossEncoder, monkeypatch: pytest.MonkeyPatch
):
    sizes, call = [], PackedPairs.__call__
    monkeypatch.setattr(
        PackedPairs,
        "__call__",
        lambda step, rows, *keep: (sizes.append(len(rows)), call(step, rows, *keep))[1],
    )
    loss = losses.MSELoss(dropping, gradient_cache=True)
    loss([["panda"] * 70, ["bear"] * 70], torch.arange(70.0)).backward()
    assert sizes == [32, 32, 6, 32, 32, 6]


@BY_PACKED
def test_pairs_without_gradient_are_not_run_again(
    packed: bool, model: CrossEncoder, monkeypatch: pytest.MonkeyPatch
):
    """Where none has one a single pair is, so that weights have the zeros that they have without
    the cache.
    """
    runs, push = [], CachedScores.push
    monkeypatch.setattr(CachedScores, "push", lambda *arguments: runs.append(push(*arguments)))
    zeros = [torch.zeros(len(row)) for row in LABELS]
    for labels, expected in ((zeros, 1), ([*zeros[:2], torch.tensor(LABELS[2])], len(LABELS[2]))):
        found, direct = (
            loss_and_gradients(
                losses.LambdaLoss(model, packed=packed, gradient_cache=cached),
                [QUERIES, DOCUMENTS],
                labels,
            )[1]
            for cached in (True, False)
        )
        assert runs.pop() == expected
        assert found.keys() == direct.keys()
        for name, gradient in direct.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)


def test_a_batch_may_be_pushed_after_the_next_was_scored(dropping: CrossEncoder):
    """Each backward pass has the random numbers, and the weights, of its own forward pass."""
    loss = losses.MSELoss(dropping, gradient_cache=True, mini_batch_size=2)
    batches = [tensors(*BATCHES["pairs"][0]), ([QUERIES[::-1], QUERIES], torch.ones(3))]
    gradients = []
    for together in (False, True):
        torch.manual_seed(5)
        dropping.zero_grad()
        values = []
        for batch in batches:
            values.append(loss(*batch))
            if not together:
                values.pop().backward()
        for value in values:
            value.backward()
        gradients.append([weight.grad.clone() for weight in dropping.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_weights_changed_before_backward_are_refused(dropping: CrossEncoder):
    value = losses.MSELoss(dropping, gradient_cache=True)(*tensors(*BATCHES["pairs"][0]))
    with torch.no_grad():
        next(dropping.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@BY_PACKED
def test_with_gradient_checkpointing(packed: bool, dropping: CrossEncoder):
    dropping.model.gradient_checkpointing_enable({"use_reentrant": False})
    results = [
        loss_and_gradients(
            losses.MSELoss(dropping, gradient_cache=cached, packed=packed, mini_batch_size=2),
            *tensors(*BATCHES["pairs"][0]),
        )
        for cached in (False, True)
    ]
    assert_same(results[1], results[0], value=1e-6, gradients=1e-6)


@BY_PACKED
def test_frozen_weights_get_nothing(packed: bool, dropping: CrossEncoder):
    for name, weight in dropping.named_parameters():
        weight.requires_grad_("classifier" in name)
    results = [
        loss_and_gradients(
            losses.MSELoss(dropping, gradient_cache=cached, packed=packed, mini_batch_size=2),
            *tensors(*BATCHES["pairs"][0]),
        )
        for cached in (False, True)
    ]
    assert len(results[0][1]) == 2
    assert_same(results[1], results[0], value=1e-6, gradients=1e-6)


def test_without_gradients_every_pair_runs_once(
    dropping: CrossEncoder, monkeypatch: pytest.MonkeyPatch
):
    sizes, call = [], PackedPairs.__call__
    monkeypatch.setattr(
        PackedPairs,
        "__call__",
        lambda step, rows, *keep: (sizes.append(len(rows)), call(step, rows, *keep))[1],
    )
    with torch.no_grad():
        value = losses.MSELoss(dropping.eval(), gradient_cache=True)(*tensors(*BATCHES["pairs"][0]))
    assert not value.requires_grad
    assert sum(sizes) == 3


def test_the_callers_autocast_holds_in_backward(dropping: CrossEncoder):
    """The second run is a part of the backward pass, which is outside of the region."""
    results = []
    for cached in (False, True):
        for packed in (True, False):
            loss = losses.MSELoss(dropping, gradient_cache=cached, packed=packed, mini_batch_size=2)
            dropping.zero_grad()
            torch.manual_seed(3)
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(*tensors(*BATCHES["pairs"][0]))
            value.backward()
            gradients = {n: p.grad.clone() for n, p in dropping.named_parameters()}
            results.append((value.detach(), gradients))
    for direct, cached in ((results[0], results[2]), (results[1], results[3])):
        assert_same(cached, direct, value=1e-6, gradients=0.01)


def test_the_cached_loss_shows_its_progress(
    model: CrossEncoder, capsys: pytest.CaptureFixture[str]
):
    loss = losses.CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=4, show_progress_bar=True
    )
    loss(*tensors(*BATCHES["tuples"][0])).backward()
    assert "18/18" in capsys.readouterr().err.rsplit("\r", 1)[-1]  # 3 anchors, 3 texts each, twice
