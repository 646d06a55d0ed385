"""NaN and infinities: divergence is seen, where it is and nowhere else, the same on every
backend.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rerank_fast.objectives.lambda_loss import LambdaLoss
from rerank_fast.ops import cpu
from rerank_fast.ops.int8_linear import int8_gelu, int8_linear, int8_norm, quantize_weight
from rerank_fast.ops.lambda_loss import count_pairs, lambda_loss
from rerank_fast.ops.reference import lambda_loss as reference
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.score_head import score_head
from rerank_fast.ops.varlen_attention import varlen_attention
from tests.ops.test_backends import SCHEMES, require_triton

nan, inf = math.nan, math.inf
BACKENDS = ["reference", "cpu", "triton"]
# Scores and labels of a list that has no loss, of one document and of more, with pairs and without.
DIVERGED = {
    "label nan": ([1, 2, 3], [1, 0, nan]),
    "label nan alone": ([1], [nan]),
    "label nan beside one": ([1, 2], [nan, 0]),
    "label inf": ([1, 2, 3], [inf, 0, 1]),
    "label infs": ([1, 2, 3], [inf, inf, 1]),
    "score nan": ([1, nan, 3], [1, 0, 2]),
    "score nan below the cut": ([1, nan, nan, nan], [1, 0, 1, 0]),
    "score nan without pairs": ([1, nan, 3], [1, 1, 1]),
    "score nan alone": ([nan], [0]),
    "score inf on top": ([inf, 2, 1], [1, 0, 0]),
    "score inf below": ([2, -inf], [1, 0]),
    "score inf in the wrong order": ([-inf, 2], [1, 0]),
    "score inf of no gain": ([-inf, 2], [-1, -2]),
    "score infs": ([inf, inf, -inf, -inf], [1, 0, 1, 0]),
    "score too large": ([1e25, 2, 1], [1, 0, 0]),
    "score too small": ([1, 2, -1e25], [1, 0, 0]),
    "everything": ([nan, inf, -inf, 0], [nan, inf, -inf, 0]),
}
FINE = ([0.5, -1, 2, 0.25, 2], [0, 2, 1, -inf, 1])


@pytest.fixture(autouse=True)
def _backend(request):
    if "triton" in str(getattr(getattr(request.node, "callspec", None), "params", "")):
        require_triton()


def flat(*lists):
    scores = torch.tensor([s for scores, _ in lists for s in scores], dtype=torch.float32)
    labels = torch.tensor([y for _, labels in lists for y in labels], dtype=torch.float32)
    sizes = torch.tensor([0, *(len(scores) for scores, _ in lists)])
    return scores.requires_grad_(), labels, sizes.cumsum(0)


def assert_rule(backend, diverged, dtype=torch.float32, **options):
    """Of three lists the one in the middle diverged."""
    scores, labels, offsets = flat(FINE, diverged, FINE)
    scores = scores.detach().to(dtype).requires_grad_()
    first, last = len(FINE[0]), len(scores) - len(FINE[0])
    losses = lambda_loss(scores, labels, offsets, reduction="none", backend=backend, **options)
    (grad,) = torch.autograd.grad(losses.sum(), scores)
    alone = flat(FINE)[0].detach().to(dtype).requires_grad_()
    expected = lambda_loss(
        alone, torch.tensor(FINE[1]), torch.tensor([0, first]), backend=backend, **options
    )
    count = count_pairs(
        alone,
        torch.tensor(FINE[1]),
        torch.tensor([0, first]),
        scheme=options["scheme"],
        k=options["k"],
    )
    (own,) = torch.autograd.grad(expected * max(int(count), 1), alone)
    assert losses.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[0], expected.detach() * count, rtol=1e-6, atol=0)
    for part in (grad[:first], grad[last:]):
        torch.testing.assert_close(
            part, own, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )
    assert grad[first:last].isnan().all()
    pairs = int(count_pairs(scores, labels, offsets, scheme=options["scheme"], k=options["k"]))
    for reduction, divisor in (("pairs", max(pairs, 1)), ("lists", 3), ("sum", 1)):
        loss = lambda_loss(scores, labels, offsets, reduction=reduction, backend=backend, **options)
        (reduced,) = torch.autograd.grad(loss, scores)
        assert loss.isnan()
        torch.testing.assert_close(
            reduced * divisor,
            grad,
            rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
            atol=1e-6,
            equal_nan=True,
        )


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("k", [None, 2])
def test_a_list_that_diverged_has_no_loss(backend, scheme, k):
    cases = list(DIVERGED.values())
    if backend == "triton":  # the interpreter takes its time: each scheme has some of them
        cases = cases[SCHEMES.index(scheme) + (k or 0) % 2 :: len(SCHEMES)]
    for diverged in cases:
        assert_rule(backend, diverged, scheme=scheme, k=k)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_of_every_dtype(backend, dtype):
    names = ["label nan", "score nan without pairs", "score inf of no gain", "score too large"]
    for name in names[::3] if backend == "triton" else names:  # the interpreter takes its time
        assert_rule(backend, DIVERGED[name], dtype, scheme="ndcg2pp", k=1)
        if backend != "triton":
            assert_rule(backend, DIVERGED[name], dtype, scheme="none", k=None)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bound_goes_by_sigma(backend):
    labels, offsets = torch.tensor([1.0, 0]), torch.tensor([0, 2])
    for sigma, bound in ((0.5, 2.0**64), (1.0, 2.0**64), (4.0, 2.0**62)):
        within = lambda_loss(
            torch.tensor([0, bound]), labels, offsets, scheme="none", sigma=sigma, backend=backend
        )
        assert within.item() == pytest.approx(sigma * bound / math.log(2), rel=1e-6)
        beyond = lambda_loss(
            torch.tensor([0, bound * 2]), labels, offsets, sigma=sigma, backend=backend
        )
        assert beyond.isnan()


def test_autograd_of_the_specification_follows_the_rule():
    options = dict(k=0, sigma=1.0, mu=10.0, eps=1e-10, reduction_log="binary", reduction="none")
    for diverged in DIVERGED.values():
        for scheme in SCHEMES:
            scores, labels, offsets = flat(FINE, diverged)
            losses = reference.lambda_loss(scores, labels, offsets, scheme=scheme, **options)
            (grad,) = torch.autograd.grad(losses.sum(), scores)
            closed = reference.forward(scores.detach(), labels, offsets, scheme=scheme, **options)
            torch.testing.assert_close(losses.detach(), closed[0], equal_nan=True)
            torch.testing.assert_close(grad, closed[1], equal_nan=True)


def test_a_weighting_of_the_users_own_follows_the_rule():
    def own(gain, discount, true_sorted):
        return gain[:, :, None] + discount[:, :, None]

    loss = LambdaLoss(own)
    for scores, labels in DIVERGED.values():
        lists, sizes = flat(FINE, (scores, labels)), [len(FINE[0]), len(scores)]
        value = loss(*lists).total
        (grad,) = torch.autograd.grad(value, lists[0])
        assert value.isnan()
        assert grad[sizes[0] :].isnan().all()
        assert grad[: sizes[0]].isfinite().all()
    assert loss(*flat(FINE)).total.isfinite()


def attend(backend, q, k, v, sizes, **options):
    ends = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).int()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = varlen_attention(*leaves, ends, ends, backend=backend, **options)
    return [
        out.detach(),
        *torch.autograd.grad(out, leaves, torch.linspace(0.5, 1.5, out.numel()).view(out.shape)),
    ]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(
    ("backend", "size"), [*itertools.product(["reference", "cpu"], [16, 12]), ("triton", None)]
)
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_attention_keeps_it_in_its_sequence(backend, value, where, size):
    if size is None:  # the interpreter takes its time: each size has each value, and each place
        size = (16, 12)[("qkv".index(where) + [nan, inf, -inf].index(value)) % 2]
    dtype = torch.bfloat16 if backend == "cpu" and size == 16 else torch.float32
    generator = torch.Generator().manual_seed(3)
    sizes = [20, 21, 3]
    tensors = [torch.randn(44, 2, size, generator=generator).to(dtype) for _ in range(3)]
    before = attend(backend, *tensors, sizes)
    tensors["qkv".index(where)][25, 1, 3] = value
    for options in ({}, {"window": (2, 2)}, {"softcap": 2.0, "window": (2, 2)}):
        after = attend(backend, *tensors, sizes, **options)
        eager = attend("reference", *tensors, sizes, **options)
        if not options:
            for ours, theirs, plain in zip(after, eager, before, strict=True):
                assert torch.equal(ours.isfinite(), theirs.isfinite())
                assert torch.equal(ours[:, 0], plain[:, 0])  # another head
                for own in (slice(0, 20), slice(41, 44)):  # another sequence
                    assert torch.equal(ours[own], plain[own])
        read = torch.arange(44) == 25 if where == "q" else (torch.arange(44) - 25).abs() <= 2
        rows = read if options or where == "q" else slice(20, 41)
        assert torch.equal(after[0][rows].isfinite(), eager[0][rows].isfinite())
        if where == "q":  # a query's result is its own
            assert after[0][~read].isfinite().all()
            # An infinite score that is capped is no more than the cap.
            assert after[0][25, 1].isfinite().any() == ("softcap" in options and math.isinf(value))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (0, 0)}], ids=str)
def test_a_query_that_reads_nothing_but_minus_infinity_is_nan(backend, dtype, options):
    """Where nothing may be read at all it is 0."""
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes in numpy, which has no bf16")
    ends = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    q, k = torch.ones(3, 1, 16, dtype=dtype), torch.ones(2, 1, 16, dtype=dtype)
    k[0, 0, 2] = -inf
    q, v = q.requires_grad_(), torch.ones(2, 1, 16, dtype=dtype)
    out = varlen_attention(q, k, v, *ends, backend=backend, **options)
    assert out[0].isnan().all()
    assert torch.equal(out[1], torch.full_like(out[1], 0 if options else 1))
    assert torch.equal(out[2], torch.ones_like(out[2]))
    (grad,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert grad[0].isnan().all()
    assert not grad[1:].any()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("where", ["x", "residual"])
def test_a_norm_keeps_it_in_its_row(backend, value, where):
    generator = torch.Generator().manual_seed(3)
    x, residual = (torch.randn(70, 24, generator=generator).requires_grad_() for _ in range(2))
    with torch.no_grad():
        {"x": x, "residual": residual}[where][33, 7] = value
    weight, bias = torch.ones(24, requires_grad=True), torch.zeros(24, requires_grad=True)
    y, _ = residual_norm(x, residual, weight, bias, eps=1e-5, backend=backend)
    own = torch.arange(70) == 33
    assert torch.equal(y.isnan(), own[:, None].expand(70, 24))
    grads = torch.autograd.grad(y, (x, residual, weight, bias), torch.ones_like(y))
    for grad in grads[:2]:
        assert torch.equal(grad.isnan(), own[:, None].expand(70, 24))
    assert grads[2].isnan().all()
    assert grads[3].isfinite().all()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("activation", ["tanh", "gelu", "relu", "none"])
def test_a_head_keeps_it_in_its_row(backend, value, activation):
    """As the modules have it: a tanh of infinity is 1, a relu of minus infinity 0."""
    generator = torch.Generator().manual_seed(3)
    hidden, dense = (
        torch.randn(40, 16, generator=generator),
        torch.randn(8, 16, generator=generator),
    )
    hidden[33, 7] = value
    index, out = torch.arange(1, 40, 2), torch.randn(1, 8, generator=generator)
    results = []
    for name in (backend, "reference"):
        leaves = [x.clone().requires_grad_() for x in (hidden, dense, out)]
        scores = score_head(
            leaves[0], index, leaves[1], None, leaves[2], None, activation=activation, backend=name
        )
        results.append([scores.detach(), *torch.autograd.grad(scores.sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        torch.testing.assert_close(
            ours[ours.isfinite()], theirs[ours.isfinite()], rtol=1e-4, atol=1e-5
        )
    assert results[0][0].isfinite().sum() >= len(index) - 1
    assert results[0][1][torch.arange(40) != 33].isfinite().all()
    if math.isnan(value):
        assert results[0][0][16].isnan()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 37])
def test_int8_rows_keep_it_in_their_row(backend, value, dtype, width, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr(cpu, "_C", None)  # which quantises rows for either
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, width, generator=generator).to(dtype)
    own = torch.arange(9) == 4
    weight, ones = (
        quantize_weight(torch.randn(width, width, generator=generator), None),
        torch.ones(width),
    )
    residual = x.float()
    before = int8_linear(x, weight, backend=backend)
    for column in (0, width - 1):
        broken = x.clone()
        broken[4, column] = value
        linear = int8_linear(broken, weight, backend=backend)
        assert torch.equal(linear[~own], before[~own])
        gelu = int8_gelu(broken, weight, backend=backend)
        norm, rows = int8_norm(broken, weight, residual, ones, ones, eps=1e-5, backend=backend)
        for result in (
            linear,
            gelu.dequantize(),
            int8_linear(gelu, weight, backend=backend),
            norm,
            rows.dequantize(),
        ):
            assert torch.equal(result.isnan(), own[:, None].expand(9, width))
