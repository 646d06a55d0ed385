"""residual_norm against the fp64 reference; Triton natively on a GPU, else in its interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rerank_fast.ops import cpu
from rerank_fast.ops.residual_norm import residual_norm
from tests.ops.conftest import each_instruction_set

HAS_GPU = torch.cuda.is_available()
EPS = 1e-5
CASES = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.float16),
]


def require(backend: str) -> None:
    if backend == "cpu":
        assert cpu.available(), cpu.unavailable_reason()
    elif backend == "triton":
        pytest.importorskip("triton")


def make(rows, width, dtype=torch.float32, seed=0):
    """x, residual, weight, bias, and the gradients of both results."""
    torch.manual_seed(seed)
    tensors = [
        torch.randn(rows, width).to(dtype),
        torch.randn(rows, width),
        torch.randn(width),
        torch.randn(width),
    ]
    return tensors, (torch.randn(rows, width), torch.randn(rows, width).to(dtype))


def run(backend, tensors, grads, *, uses=(True, True), **options):
    """y, narrow and the gradients of x, residual, weight and bias."""
    device = "cuda" if backend == "triton" and HAS_GPU else "cpu"
    leaves = [t.detach().to(device).requires_grad_() for t in tensors]
    results = residual_norm(*leaves, eps=EPS, backend=backend, **options)
    used = [
        (result, grad.to(device))
        for result, grad, use in zip(results, grads, uses, strict=True)
        if use
    ]
    outs, upstream = zip(*used, strict=True)
    return [
        x.cpu()
        for x in (*(r.detach() for r in results), *torch.autograd.grad(outs, leaves, upstream))
    ]


def assert_close(backend, dtype, rows, width, **options):
    require(backend)
    tensors, grads = make(rows, width, dtype)
    exact = run("reference", [t.double() for t in tensors], [g.double() for g in grads], **options)
    for kernels in each_instruction_set(backend):
        actual = run(backend, tensors, grads, **options)
        assert [x.dtype for x in actual] == [torch.float32, dtype, dtype, *[torch.float32] * 3]
        for ours, true in zip(actual, exact, strict=True):
            eps = torch.finfo(ours.dtype).eps
            bound = (
                (64 * eps if ours.dtype == torch.float32 else eps) * true.abs().max().clamp(min=1)
                if rows
                else 0
            )
            assert ours.shape == true.shape
            assert rows == 0 or (ours.double() - true).abs().max() <= bound, kernels


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 17), (70, 48), (33, 384)])
def test_shapes_and_dropout(backend, dtype, rows, width, dropout_p):
    assert_close(backend, dtype, rows, width, dropout_p=dropout_p, seed=0x3ABC_DEF0_1234_5678)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_no_rows(backend, dtype):
    assert_close(backend, dtype, 0, 16)


@pytest.mark.parametrize("uses", [(True, False), (False, True)])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_one_of_the_two_results_is_used(backend, dtype, uses):
    require(backend)
    tensors, grads = make(5, 24, dtype)
    actual = run(backend, tensors, grads, uses=uses, dropout_p=0.2, seed=4)
    exact = run("reference", tensors, grads, uses=uses, dropout_p=0.2, seed=4)
    for ours, true in zip(actual, exact, strict=True):
        rtol = 1e-5 if ours.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours, true, rtol=rtol, atol=rtol)


def test_reference_is_torch_layer_norm():
    tensors, grads = make(9, 32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = F.layer_norm(leaves[0] + leaves[1], (32,), leaves[2], leaves[3], EPS)
    y, narrow = residual_norm(*tensors, eps=EPS, backend="reference")
    assert narrow is y  # fp32 needs no second copy
    torch.testing.assert_close(y, expected.detach())
    actual = run("reference", tensors, grads, uses=(True, False))[2:]
    for ours, true in zip(actual, torch.autograd.grad(expected, leaves, grads[0]), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_the_same_bits_every_time_and_strided_input(backend, dtype):
    require(backend)
    tensors, grads = make(70, 48, dtype)
    first = run(backend, tensors, grads, dropout_p=0.1, seed=1)
    turned = [t.t().contiguous().t() if t.dim() == 2 else t for t in tensors]
    for ours, theirs in zip(run(backend, turned, grads, dropout_p=0.1, seed=1), first, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("backend", "dtype"), [*CASES, ("reference", torch.float64)])
def test_some_rows_alone_lose_what_they_lost_among_all(backend, dtype):
    require(backend)
    tensors, grads = make(70, 48, dtype if dtype != torch.float64 else torch.float32)
    grads = [grad * (torch.arange(70) % 3 == 0)[:, None] for grad in grads]
    kept = torch.arange(0, 70, 3)
    whole = run(backend, tensors, grads, dropout_p=0.4, seed=7)
    few = [t[kept] if t.dim() == 2 else t for t in tensors]
    rows = kept.int().to("cuda" if backend == "triton" and HAS_GPU else "cpu")
    alone = run(backend, few, [g[kept] for g in grads], dropout_p=0.4, seed=7, rows=rows)
    for ours, theirs in zip(alone[:4], whole[:4], strict=True):
        assert torch.equal(ours, theirs[kept])
    for ours, theirs in zip(alone[4:], whole[4:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    without = run(backend, few, [g[kept] for g in grads], dropout_p=0.4, seed=7)
    assert not torch.equal(without[0], alone[0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p):
    tensors, _ = make(3, 5)
    leaves = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda *x: residual_norm(*x, eps=EPS, dropout_p=dropout_p, seed=3, backend="reference")[0],
        leaves,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend, dtype):
    tensors, grads = make(5, 24, dtype)
    for rows in (None, torch.tensor([1, 4, 5, 9, 12], dtype=torch.int32)):
        options = (rows, EPS, 0.1, 3, backend)
        torch.library.opcheck(torch.ops.rerank_fast.residual_norm.default, (*tensors, *options))
        _, _, mean, rstd = torch.ops.rerank_fast.residual_norm.default(*tensors, *options)
        arguments = (*tensors[:3], mean, rstd, grads[0], None, *options)
        torch.library.opcheck(torch.ops.rerank_fast.residual_norm_backward.default, arguments)


def test_compiles_as_one_graph():
    tensors, grads = make(5, 24)
    leaves = [t.requires_grad_() for t in tensors]

    def doubled(x, *rest):
        return residual_norm(x * 2, *rest, eps=EPS)[0]

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(doubled(*leaves), leaves, grads[0])
    for ours, theirs in zip(
        torch.autograd.grad(compiled(*leaves), leaves, grads[0]), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_errors_say_what_was_expected_and_what_came():
    (x, residual, weight, bias), _ = make(3, 8)
    wrong = [
        (
            lambda: residual_norm(x, residual[:2], weight, bias, eps=EPS),
            r"one shape \(T, H\) with H of at",
        ),
        (lambda: residual_norm(x, residual, weight[:4], bias, eps=EPS), r"shape \(8,\), got"),
        (
            lambda: residual_norm(x, residual.half(), weight, bias, eps=EPS),
            "all be fp32 or all fp64",
        ),
        (lambda: residual_norm(x, residual, weight, bias, eps=EPS, dropout_p=-0.1), "dropout_p"),
        (
            lambda: residual_norm(x, residual, weight, bias, eps=EPS, backend="x"),
            "backend must be one of",
        ),
        (
            lambda: residual_norm(x, residual, weight, bias, eps=EPS, rows=torch.arange(3)),
            r"rows must be int32 of shape \(3,\) on cpu, got torch.int64 \(3,\)",
        ),
        (
            lambda: residual_norm(x.half(), residual, weight, bias, eps=EPS, backend="cpu"),
            "bf16 or fp32 on the CPU",
        ),
        (
            lambda: residual_norm(
                *(t.double() for t in (x, residual, weight, bias)), eps=EPS, backend="triton"
            ),
            "fp32 residual",
        ),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
