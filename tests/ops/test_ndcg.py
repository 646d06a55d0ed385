"""NDCG on tensors: worked out by hand, scikit-learn's formula, the backends, validation,
registration.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import rerank_fast
from rerank_fast.ops.ndcg import ndcg
from tests.ops.test_backends import ragged, require_triton

BACKENDS = ["reference", "cpu", "triton"]


@pytest.fixture(autouse=True)
def _triton(request):
    if "triton" in str(request.node.callspec.params if hasattr(request.node, "callspec") else ""):
        require_triton()


def by_hand(scores, labels, k):
    """DCG over ideal DCG, term by term in plain Python; at each rank the mean gain of its tie."""
    gain = [2 ** max(y, 0) - 1 for y in labels]
    gain_at = []
    for score in sorted(scores, reverse=True):
        tie = [g for g, s in zip(gain, scores, strict=True) if s == score]
        gain_at.append(sum(tie) / len(tie))
    found = sum(g / math.log2(1 + r) for r, g in enumerate(gain_at[: k or None], start=1))
    ideal = sum(
        g / math.log2(1 + r) for r, g in enumerate(sorted(gain, reverse=True)[: k or None], start=1)
    )
    return found / ideal if ideal else 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_documents_worked_out_on_paper(backend):
    # The relevant document is second: (1 / log2 3) / 1.
    scores, labels, offsets = (
        torch.tensor([0.1, 0.9, -1.0]),
        torch.tensor([1, 0, 0]),
        torch.tensor([0, 3]),
    )
    assert ndcg(scores, labels, offsets, backend=backend).item() == pytest.approx(1 / math.log2(3))
    assert ndcg(scores, labels, offsets, 1, backend=backend).item() == 0
    assert ndcg(-scores, labels, offsets, 2, backend=backend).item() == pytest.approx(
        1 / math.log2(3)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [None, 0, 1, 3, 10, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lists_written_out(backend, k, dtype):
    sizes = [5, 0, 37, 1, 70, 2]
    scores, labels, offsets = ragged(sizes, grades=4)
    scores, labels = (scores * 4).round().to(dtype) / 4, labels - 1  # many ties, labels below 0
    values = ndcg(scores, labels, offsets, k, backend=backend)
    assert values.dtype == torch.promote_types(dtype, torch.float32)
    expected = [
        by_hand(scores[a:b].tolist(), labels[a:b].tolist(), k)
        for a, b in itertools.pairwise(offsets.tolist())
    ]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert values.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [None, 2])
def test_ties_are_the_mean_over_their_orders(backend, k):
    """Each order of the documents made the only one by scores that differ."""
    scores, labels = [1.0, 0.0, 1.0, 0.0, 1.0], torch.tensor([2.0, 1, 0, 0, 1])
    orders = [one for one in itertools.permutations(range(5)) if set(one[:3]) == {0, 2, 4}]
    places = torch.tensor(orders).argsort(dim=1).double().reshape(-1)
    offsets = torch.arange(len(orders) + 1) * 5
    expected = ndcg(-places, labels.repeat(len(orders)), offsets, k, backend=backend).mean().item()
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):  # whatever the order of input
        tied = torch.tensor(scores)[order]
        value = ndcg(tied, labels[order], torch.tensor([0, 5]), k, backend=backend)
        assert value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [3, 100])
def test_a_constant_model_is_worth_what_chance_is(backend, size):
    labels = torch.zeros(size)
    labels[0] = 1
    value = ndcg(torch.zeros(size), labels, torch.tensor([0, size]), backend=backend)
    chance = sum(1 / math.log2(1 + r) for r in range(1, size + 1)) / size
    assert value.item() == pytest.approx(chance, rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_scikit_learn_agrees(tied):
    """Whose gains are the labels themselves, and which averages over ties too."""
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels, offsets = ragged([30] * 5, grades=2)
    if tied:
        scores = scores.round()
    for k in (None, 10):
        expected = [
            metrics.ndcg_score(y[None].numpy(), s[None].numpy(), k=k)
            for y, s in zip(labels.split(30), scores.split(30), strict=True)
        ]
        assert ndcg(scores, labels, offsets, k).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_without_a_positive_and_large_labels(backend):
    scores = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0, 0.5])
    labels = torch.tensor([0.0, -1.0, 0.0, 1000.0, 0.0, 999.0])
    values = ndcg(scores, labels, torch.tensor([0, 0, 3, 6]), backend=backend)
    assert values[:2].tolist() == [0, 0]
    expected = (1 + 0.5 / math.log2(4)) / (1 + 0.5 / math.log2(3))
    assert values[2].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan(backend):
    """A score or a label that is NaN, or an infinite gain, is seen, and stays in its list."""
    scores, offsets = torch.tensor([1.0, math.nan, 0.0, 1.0, 2.0]), torch.tensor([0, 3, 5])
    for labels in ([1.0, 0, 0, 1, 0], [0.0, 0, 0, 1, 0]):
        values = ndcg(scores, torch.tensor(labels), offsets, backend=backend)
        assert values.isnan().tolist() == [True, False]
        assert values[1].item() == pytest.approx(1 / math.log2(3))
    for label in (math.nan, math.inf):
        labels = torch.tensor([1.0, 0, label, 1, 0])
        values = ndcg(scores.nan_to_num(), labels, offsets, 1, backend=backend)
        assert values.isnan().tolist() == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_scores_are_the_extremes_and_tie_with_each_other(backend):
    inf = math.inf
    scores = torch.tensor([inf, inf, -inf, -inf, 0, inf])
    labels = torch.tensor([1, 0, 0, 1, -inf, 0.0])
    values = ndcg(scores, labels, torch.tensor([0, 3, 6]), backend=backend)
    expected = [(1 + 1 / math.log2(3)) / 2, 1 / math.log2(4)]
    assert values.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_layout_and_no_gradient(backend):
    scores, labels, offsets = ragged([4, 9, 3])
    expected = ndcg(scores, labels, offsets, 5, backend=backend)
    apart = torch.stack([scores, scores], 1)[:, 0].requires_grad_()
    actual = ndcg(apart, torch.stack([labels, labels], 1)[:, 1].long(), offsets, 5, backend=backend)
    assert torch.equal(actual, expected)
    assert not actual.requires_grad
    assert ndcg(scores[:0], labels[:0], offsets[:1], backend=backend).shape == (0,)


def test_public_name_errors_and_registration():
    scores, labels, offsets = ragged([4, 9, 3])
    assert rerank_fast.ndcg is ndcg
    for arguments, message in (
        ((scores[None], labels, offsets), "scores must be"),
        ((scores, labels[1:], offsets), "labels must have the shape of scores"),
        ((scores, labels, offsets[1:]), "offsets must rise from 0"),
        ((scores, labels, offsets.int()), "offsets must be int64"),
        (
            (scores, labels, offsets, -1),
            r"k must be None or a whole number from 0 to 2\*\*63 - 1, got -1",
        ),
        (
            (scores, labels, offsets, 1.5),
            r"k must be None or a whole number from 0 to 2\*\*63 - 1, got 1.5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ndcg(*arguments)
    with pytest.raises(ValueError, match="backend must be one of"):
        ndcg(scores, labels, offsets, backend="cuda")
    for backend in ("reference", "cpu"):
        torch.library.opcheck(
            torch.ops.rerank_fast.ndcg.default, (scores, labels, offsets, 3, backend)
        )
    compiled = torch.compile(
        lambda *lists: 2 * ndcg(*lists, 5), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(scores, labels, offsets), 2 * ndcg(scores, labels, offsets, 5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_does_not_wait():
    lists = [tensor.cuda() for tensor in ragged([16, 1000, 3])]
    ndcg(*lists)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ndcg(*lists, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
