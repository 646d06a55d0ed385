"""Approximate ranks: worked out by hand, the backends, the gradient, validation, registration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rerank_fast.ops import cpu
from rerank_fast.ops.approx_ranks import approx_ranks
from tests.ops.test_backends import require_triton

BACKENDS = ["reference", "cpu", "triton"]
SIZES = [5, 0, 37, 1, 130, 2]


@pytest.fixture(autouse=True)
def _triton(request):
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "triton" in str(params):
        require_triton()


def ragged(sizes=SIZES, *, dtype=torch.float64, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sum(sizes), generator=generator, dtype=torch.float64) * spread
    return scores.to(dtype), torch.tensor([0, *itertools.accumulate(sizes)])


def by_hand(s, alpha):
    return [1 + sum(1 / (1 + math.exp(alpha * (a - b))) for b in s) - 0.5 for a in s]


def both(scores, offsets, upstream, **options):
    """Ranks, and the gradient of their sum weighed by `upstream`."""
    leaf = scores.clone().requires_grad_()
    ranks = approx_ranks(leaf, offsets, **options)
    ranks.backward(upstream.to(ranks.dtype))
    return ranks.detach(), leaf.grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_documents_worked_out_on_paper(backend):
    # sigmoid(2 (1 - 0)) above the second, its complement above the first.
    upstream = torch.tensor([1.0, 0.0])
    scores, offsets = torch.tensor([0.0, 1.0]), torch.tensor([0, 2])
    ranks, grad = both(scores, offsets, upstream, alpha=2.0, backend=backend)
    above = 1 / (1 + math.exp(-2))
    assert ranks.tolist() == pytest.approx([1 + above, 2 - above], rel=1e-6)
    slope = 2 * above * (1 - above)
    assert grad.tolist() == pytest.approx([-slope, slope], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lists_written_out(backend, alpha, dtype):
    scores, offsets = ragged(dtype=dtype)
    ranks = approx_ranks(scores, offsets, alpha=alpha, backend=backend)
    expected = []
    for start, stop in itertools.pairwise(offsets.tolist()):
        expected += by_hand(scores[start:stop].tolist(), alpha)
    assert ranks.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert ranks.tolist() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backends_within_the_error_of_the_eager_formula(backend, spread, dtype):
    """Narrow lists share exponentials, wide ones take one a pair: as near as eager PyTorch."""
    scores, offsets = ragged(dtype=dtype, spread=spread)
    upstream = torch.randn(len(scores), generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = both(scores.double(), offsets, upstream, backend="reference")
    eager = both(scores, offsets, upstream, backend="reference")
    ours = both(scores, offsets, upstream, backend=backend)
    rounding = 32 * torch.finfo(dtype).eps
    for own, theirs, true in zip(ours, eager, exact, strict=True):
        eager_error, scale = (theirs - true).abs().max(), true.abs().max()
        assert (own - true).abs().max() <= eager_error + rounding * scale


@pytest.mark.parametrize("set_name", cpu.instruction_sets())
def test_every_instruction_set(set_name):
    scores, offsets = ragged(dtype=torch.float32)
    upstream = torch.randn(len(scores), generator=torch.Generator().manual_seed(1))
    before = cpu.instruction_set()
    cpu.choose_instruction_set(set_name)
    try:
        for factor in (1.0, 100.0):
            exact = both(scores.double() * factor, offsets, upstream, backend="reference")
            ours = both(scores * factor, offsets, upstream, backend="cpu")
            for own, true in zip(ours, exact, strict=True):
                assert (own - true).abs().max() <= 4e-6 * true.abs().max()
    finally:
        cpu.choose_instruction_set(before)


def test_results_do_not_depend_on_the_number_of_threads():
    scores, offsets = ragged([300, 5, 700], dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(both(scores, offsets, scores, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_gradcheck(backend, spread):
    scores, offsets = ragged([4, 0, 7, 1], spread=spread)
    scores.requires_grad_()
    options = {"alpha": 0.7, "backend": backend}
    assert torch.autograd.gradcheck(lambda s: approx_ranks(s, offsets, **options), (scores,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[], [0], [0, 0], [1], [1, 0, 1]])
def test_lists_without_a_pair(backend, sizes):
    scores, offsets = ragged(sizes, dtype=torch.float32)
    ranks, grad = both(scores, offsets, torch.ones(len(scores)), backend=backend)
    assert ranks.tolist() == [1.0] * len(scores)
    assert grad.tolist() == [0.0] * len(scores)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_what_is_no_number_is_seen_in_its_list_alone(backend, value, at):
    scores, offsets = ragged([5, 3], dtype=torch.float32)
    clean, _ = both(scores, offsets, scores, backend=backend)
    scores[at] = value
    ranks, grad = both(scores, offsets, torch.ones(8), backend=backend)
    assert ranks[at].isnan()
    assert grad[at].isnan()
    if math.isnan(value):
        assert ranks[:5].isnan().all()
    torch.testing.assert_close(ranks[5:], clean[5:], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_share_the_mean_of_their_ranks(backend):
    scores, offsets = torch.tensor([5.0, -5, 5, 5, -5]), torch.tensor([0, 5])
    ranks = approx_ranks(scores, offsets, alpha=100.0, backend=backend)
    assert ranks.tolist() == pytest.approx([2, 4.5, 2, 2, 4.5])


def test_public_errors_registration_and_compilation():
    scores, offsets = ragged([4, 9, 3])
    for arguments, options, message in (
        ((scores[None], offsets), {}, "scores must be"),
        ((scores, offsets.int()), {}, "offsets must be"),
        ((scores, offsets), {"alpha": 0}, "alpha must be .* above 0, got 0"),
        ((scores, offsets), {"backend": "cuda"}, "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            approx_ranks(*arguments, **options)
    for backend in ("reference", "cpu"):
        ops = torch.ops.rerank_fast
        torch.library.opcheck(ops.approx_ranks.default, (scores, offsets, 1.0, backend))
        arguments = (scores, scores, offsets, 1.0, backend)
        torch.library.opcheck(ops.approx_ranks_backward.default, arguments)

        def loss(s, backend=backend):
            return approx_ranks(s, offsets, backend=backend).square().sum()

        leaves = [scores.clone().requires_grad_() for _ in range(2)]
        torch.compile(loss, backend="aot_eager", fullgraph=True)(leaves[0]).backward()
        loss(leaves[1]).backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_second_derivatives_are_refused():
    scores, offsets = ragged([4])
    scores.requires_grad_()
    (grad,) = torch.autograd.grad(approx_ranks(scores, offsets).sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="can't be differentiated"):
        grad.sum().backward()
