"""Offsets and indices at fault: a clear error, or NaN, and no access outside of the tensors.

A GPU's values are not read on the host, so Triton's kernels themselves must keep inside. Here they
run in the interpreter, where every address of a load or a store is held against the tensors that
the kernel was given.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rerank_fast.ops.approx_ranks import approx_ranks
from rerank_fast.ops.lambda_loss import count_pairs, lambda_loss
from rerank_fast.ops.ndcg import ndcg
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.score_head import score_head
from rerank_fast.ops.varlen_attention import varlen_attention
from tests.ops.test_backends import OPTIONS, REDUCTIONS, ragged, require_triton

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


def spans(arguments) -> np.ndarray:
    """(tensors, 2) first and last address of each tensor."""
    found = []
    for tensor in arguments:
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            last = sum(
                (size - 1) * stride
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            found.append((start, start + (last + 1) * tensor.element_size()))
    return np.array(found, dtype=np.uint64).reshape(-1, 2)


class Guard:
    """Stands before the interpreter's memory."""

    def __init__(self, inner):
        self.inner, self.allowed, self.accesses = inner, spans([]), 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def check(self, pointers, mask, size):
        addresses = pointers[np.broadcast_to(mask, pointers.shape)]
        self.accesses += len(addresses)
        starts, ends = self.allowed.T
        inside = (addresses[:, None] >= starts) & (addresses[:, None] + np.uint64(size) <= ends)
        assert inside.any(axis=1).all(), (
            f"outside of the tensors: {addresses[~inside.any(axis=1)][:4]}"
        )

    def load(self, pointers, mask, other, dtype):
        self.check(pointers, mask, np.dtype(dtype).itemsize)
        return self.inner.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self.check(pointers, mask, values.dtype.itemsize)
        return self.inner.store(pointers, values, mask)


@pytest.fixture
def guard(monkeypatch):
    require_triton()
    from triton.runtime import interpreter

    guard = Guard(interpreter._interpreter)
    call = interpreter.GridExecutor.__call__

    def guarded(executor, *arguments, **options):
        guard.allowed = spans([*arguments, *options.values()])
        return call(executor, *arguments, **options)

    monkeypatch.setattr(interpreter, "_interpreter", guard)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", guarded)
    # A GPU's offsets are not looked at before the kernels read them.
    for check in ("check_offsets", "check_ends"):
        monkeypatch.setattr(f"rerank_fast.ops.ragged.{check}", lambda *_: None)
    # torch.empty gives NaN and the largest integers, not what was there.
    torch.use_deterministic_algorithms(True)
    yield guard
    torch.use_deterministic_algorithms(False)
    assert guard.accesses


@interpreted
@pytest.mark.parametrize("missing", ["read", "written"])
def test_the_guard_sees_one_element_too_many(guard, missing):
    from triton import language as tl

    from rerank_fast.ops.triton.ndcg import LAUNCH, ndcg_kernel

    scores, labels, offsets = ragged([20, 20])
    values = torch.empty(2)
    ndcg_kernel[(2,)](scores, labels, offsets, values, 3, 40, dtype=tl.float32, **LAUNCH)
    scores, values = (scores[:39], values) if missing == "read" else (scores, values[:1])
    with pytest.raises(Exception, match="outside of the tensors"):
        ndcg_kernel[(2,)](scores, labels, offsets, values, 3, 40, dtype=tl.float32, **LAUNCH)


def bad_offsets(n: int) -> list[list[int]]:
    """Too far, too short, decreasing, negative, beyond 32 bits; and some drawn at random."""
    far = 2**40
    found = [
        [0, n + 1],
        [0, n - 1],
        [1, n],
        [-1, n],
        [n, 0],
        [0, 99, n],
        [0, n // 2, n // 2 + 1],
        [0, -5, n],
        [0, n, n // 2, n],
        [0, n // 2 + 3, n // 2 - 3, n],
        [0, far, n],
        [0, -far, n],
        [far, -far, far, -far],
        [0, n, far, n],
        [0, 3, 3, 1, 3, n, n],
        [2, 5, n, n],
        [0, 0, 0],
        [-far] * 4,
        [far] * 4,
    ]
    generator = np.random.default_rng(0)
    for _ in range(40):
        size = int(generator.integers(2, 9))
        bounds = generator.choice([0, n, n + 1, -1, far, *range(n)], size).tolist()
        if generator.random() < 0.5:
            bounds[0], bounds[-1] = 0, n
        found.append(bounds)
    return [
        bounds for bounds in found if [bounds[0], bounds[-1]] != [0, n] or bounds != sorted(bounds)
    ]


ORDERS = {"ordered by its blocks": 1024, "ordered by a launch": 0, "either": 12}


@interpreted
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_lambda_loss_of_bad_offsets_is_nan(guard, monkeypatch, order, reduction):
    """Each of them once: the interpreter takes its time."""
    from rerank_fast.ops.triton import lambda_loss as kernels

    monkeypatch.setattr(kernels, "SMALL_BATCH", ORDERS[order])
    monkeypatch.setattr(kernels, "SHORT_LIST", ORDERS[order])
    scores, labels, _ = ragged([40], grades=3)
    own = REDUCTIONS.index(reduction) * len(ORDERS) + list(ORDERS).index(order)
    for number, bounds in enumerate(bad_offsets(40)[own :: len(ORDERS) * len(REDUCTIONS)]):
        offsets = torch.tensor(bounds)
        options = {"scheme": ("ndcg2pp", "none", "ndcg1")[number % 3], "k": (0, 3)[number % 2]}
        loss, grad, _ = kernels.forward(
            scores, labels, offsets, **OPTIONS | options | {"reduction": reduction}
        )
        assert loss.isnan().all(), bounds
        assert grad.isnan().all(), bounds
        kernels.backward(torch.ones(40), torch.ones_like(loss), offsets, torch.float32)
    offsets = torch.tensor([0, 0, 7, 7, 39, 40, 40])
    loss, grad, _ = kernels.forward(scores, labels, offsets, **OPTIONS | {"reduction": reduction})
    assert loss.isfinite().all()
    assert grad.isfinite().all()


@interpreted
def test_ndcg_of_bad_offsets_is_nan(guard):
    from rerank_fast.ops.triton.ndcg import forward

    scores, labels, _ = ragged([40], grades=3)
    for bounds in bad_offsets(40):
        values = forward(scores, labels, torch.tensor(bounds), 3)
        assert values.isnan().any(), bounds
        for q, (start, end) in enumerate(itertools.pairwise(bounds)):
            lies = 0 <= start <= end <= 40
            if lies and (q or start == 0) and (q < len(values) - 1 or end == 40):
                alone = ndcg(
                    scores[start:end], labels[start:end], torch.tensor([0, end - start]), 3
                )
                torch.testing.assert_close(values[q], alone[0])
            else:
                assert values[q].isnan()


@interpreted
def test_approx_ranks_of_bad_offsets_keep_inside(guard):
    from rerank_fast.ops.triton.approx_ranks import backward, forward

    scores, _, _ = ragged([40])
    for bounds in bad_offsets(40)[::4]:
        forward(scores, torch.tensor(bounds), 1.0)
        backward(scores, scores, torch.tensor(bounds), 1.0)


SIDES = ["queries", "keys", "both"]
WINDOWS = [(-1, -1), (3, 2)]


@interpreted
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("window", WINDOWS)
def test_attention_of_bad_sequences_keeps_inside(guard, side, window):
    from rerank_fast.ops.triton import varlen_attention as ahead
    from rerank_fast.ops.triton import varlen_attention_backward as back

    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(40, 1, 16, generator=generator) for _ in range(4))
    rows = torch.arange(40, dtype=torch.int32)
    own = SIDES.index(side) * len(WINDOWS) + WINDOWS.index(window)
    for number, bounds in enumerate(bad_offsets(40)[own :: len(SIDES) * len(WINDOWS)]):
        bad = torch.tensor(bounds).clamp(-(2**31), 2**31 - 1).int()
        good = torch.linspace(0, 40, len(bounds)).int()
        ends = {"queries": (bad, good), "keys": (good, bad), "both": (bad, bad)}[side]
        options = (rows, 0.25, *window, 0.1 * (number % 2), 3, 2.0 if number % 3 == 0 else None)
        out, lse = ahead.forward(q, k, v, *ends, *options)
        grads = back.backward(q, k, v, out, lse, grad, *ends, *options)
        if len(bounds) == 2:  # one sequence, which does not fit
            assert all(x.isnan().all() for x in (out, *grads)), bounds


@interpreted
def test_attention_of_a_sequence_beyond_the_tokens_is_nan(guard):
    from rerank_fast.ops.triton.varlen_attention import forward

    q = torch.randn(9, 2, 16)
    options = (None, 0.25, -1, -1, 0.0, 0)
    for bounds in ([0, 50, 9], [0, 4, 50], [0, 4, 5], [1, 4, 9]):
        ends = torch.tensor(bounds, dtype=torch.int32)
        out, _ = forward(q, q, q, ends, ends, *options)
        start, end = (0, 4) if bounds in ([0, 50, 9], [1, 4, 9]) else (4, 9)
        assert out[start:end].isnan().all(), bounds


@interpreted
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_a_score_of_no_row_is_nan(guard, kind):
    from rerank_fast.ops.triton import score_head as ahead
    from rerank_fast.ops.triton import score_head_backward as back

    generator = torch.Generator().manual_seed(0)
    hidden, dense = (
        torch.randn(20, 12, generator=generator),
        torch.randn(8, 12, generator=generator),
    )
    bias, out = torch.randn(8, generator=generator), torch.randn(1, 8, generator=generator)
    rows = [0, 20, 3, -1, 19, torch.iinfo(kind).max, torch.iinfo(kind).min]
    index, good = torch.tensor(rows, dtype=kind), torch.tensor([0, 2, 4])
    for options in (("tanh", 0.0, 0.0, 0), ("relu", 0.3, 0.2, 5)):
        scores, kept = ahead.forward(hidden, index, dense, bias, out, None, *options)
        assert scores.isnan().tolist() == [False, True, False, True, False, True, True]
        tensors = (hidden, index, dense, bias, out, kept)
        grads = back.backward(torch.ones(7), *tensors, [True] * 5, *options)
        assert all(grad.isnan().any() for grad in grads[1:4])
        assert grads[0].isfinite().all()
        assert torch.equal(grads[0].any(dim=1).nonzero().flatten(), index[good])
    plain, _ = ahead.forward(hidden, index[good], dense, bias, out, None, "tanh", 0.0, 0.0, 0)
    scores, _ = ahead.forward(hidden, index, dense, bias, out, None, "tanh", 0.0, 0.0, 0)
    torch.testing.assert_close(scores[good], plain)


@interpreted
def test_what_is_right_keeps_inside_too(guard):
    """Every op, forward and backward, at sizes that are no whole blocks."""
    scores, labels, offsets = ragged([1, 0, 37, 2])
    lambda_loss(scores.requires_grad_(), labels, offsets, backend="triton").backward()
    ndcg(scores, labels, offsets, backend="triton")
    q = torch.randn(21, 4, 12, requires_grad=True)
    k = torch.randn(33, 2, 12, requires_grad=True)
    ends_q, ends_k = torch.tensor([0, 1, 1, 21]).int(), torch.tensor([0, 7, 9, 33]).int()
    attended = varlen_attention(
        q, k, k, ends_q, ends_k, window=(5, 3), dropout_p=0.2, backend="triton"
    )
    attended.sum().backward()
    x, row = torch.randn(17, 19, requires_grad=True), torch.randn(19, requires_grad=True)
    residual_norm(x, x, row, row, eps=1e-5, dropout_p=0.2, backend="triton")[0].sum().backward()
    dense, out = torch.randn(5, 19, requires_grad=True), torch.randn(1, 5, requires_grad=True)
    index = torch.tensor([16, 0, 5])
    score_head(
        x, index, dense, None, out, None, dropout_p=0.2, training=True, backend="triton"
    ).sum().backward()


# Compiled, the checks in Python are traced away.
N = 12


def _loss(backend):
    return lambda offsets: lambda_loss(
        torch.linspace(0, 1, N), torch.arange(N) % 2.0, offsets, backend=backend
    )


def _ndcg(backend):
    return lambda offsets: ndcg(
        torch.linspace(0, 1, N), torch.arange(N) % 2.0, offsets, 3, backend=backend
    )


def _approx_ranks(backend):
    return lambda offsets: approx_ranks(torch.linspace(0, 1, N), offsets, backend=backend)


def _attention(backend):
    def run(ends):
        q = torch.ones(N, 2, 16)
        good = torch.arange(len(ends), dtype=torch.int32) * N // (len(ends) - 1)
        return varlen_attention(q, q, q, ends, good, backend=backend), varlen_attention(
            q, q, q, good, ends, backend=backend
        )

    return run


def _head(backend):
    def run(index):
        hidden = torch.ones(N, 8)
        return score_head(hidden, index, torch.eye(8), None, hidden[:1], None, backend=backend)

    return run


def _norm(backend):
    def run(rows):
        x = torch.ones(N, 8)
        return residual_norm(x, x, x[0], x[0], eps=1e-5, dropout_p=0.5, rows=rows, backend=backend)[
            0
        ]

    return run


def _count(scheme, k):
    return lambda offsets: count_pairs(
        torch.linspace(0, 1, N), torch.arange(N) % 2.0, offsets, scheme=scheme, k=k
    )


BAD = [
    [0, 99, N],
    [0, 4, 5],
    [0, 50, N],
    [0, 9, 5, N],
    [0, -3, N],
    [1, 4, N],
    [0, 4, N + 1],
    [0, 2**31 - 1, N],
]
INDICES = [[0, N], [-1, 2], [2**31 - 1, 0], [-(2**31), 3], [3, 1, 3]]
COMPILED = {
    f"lambda_loss {b}": (_loss(b), BAD, torch.int64) for b in ("cpu", "reference", "triton")
}
COMPILED |= {f"ndcg {b}": (_ndcg(b), BAD, torch.int64) for b in ("cpu", "reference", "triton")}
for name in ("cpu", "reference", "triton"):
    COMPILED[f"approx_ranks {name}"] = (_approx_ranks(name), BAD, torch.int64)
COMPILED |= {
    f"varlen_attention {b}": (_attention(b), BAD, torch.int32)
    for b in ("cpu", "reference", "triton")
}
COMPILED |= {
    f"score_head {b}": (_head(b), INDICES, torch.int64) for b in ("cpu", "reference", "triton")
}
COMPILED |= {
    f"count_pairs {s} {k}": (_count(s, k), BAD, torch.int64)
    for s in ("ndcg1", "ndcg2pp")
    for k in (None, 3)
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_values_at_fault_are_an_error(name, mode):
    if "triton" in name:
        require_triton()
        if torch.cuda.is_available():
            pytest.skip("needs Triton's interpreter")
    run, wrong, dtype = COMPILED[name]
    if mode == "compiled":
        torch._dynamo.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    good = [0, 4, N] if wrong is BAD else [0, 4]
    run(torch.tensor(good, dtype=dtype))
    for values in wrong:
        with pytest.raises(
            ValueError, match=r"must rise from 0 to|must hold different rows"
        ) as error:
            run(torch.tensor(values, dtype=dtype))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_rows_of_a_dropout_may_be_any_numbers(backend):
    """They are hashed and are no places."""
    if backend == "triton":
        require_triton()
    compiled = torch.compile(_norm(backend), backend="aot_eager", fullgraph=True)
    rows = torch.tensor([2**31 - 1, -(2**31), -1, 99, *range(N - 4)], dtype=torch.int32)
    assert torch.equal(compiled(rows), _norm("reference")(rows))
    with pytest.raises((ValueError, RuntimeError), match=r"rows must be int32 of shape \(12,\)"):
        _norm(backend)(rows[1:])


def test_compiled_attention_trains_and_refuses():
    """Forward and backward of a graph whose lengths are its inputs."""

    def run(q, ends):
        return varlen_attention(q, q * 2, q - 1, ends, ends).square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    q = torch.randn(9, 2, 16, requires_grad=True)
    compiled(q, torch.tensor([0, 4, 9], dtype=torch.int32)).backward()
    for bounds in ([0, 50, 9], [0, 4, 5], [0, 9, 4]):
        with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to 9 tokens"):
            compiled(q, torch.tensor(bounds, dtype=torch.int32))
