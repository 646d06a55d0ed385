"""The C++ kernels between the products of a layer beside PyTorch in fp64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rerank_fast.ops.cpu import available, unavailable_reason
from rerank_fast.ops.layer_kernels import LayerKernels, kernels_of

pytestmark = [
    pytest.mark.skipif(not available(), reason=unavailable_reason()),
    pytest.mark.usefixtures("instruction_set"),
]
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 8), (1, 3), (5, 7), (67, 48), (130, 100)]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """In units of the largest value: bf16 is rounded once."""
    bound = 2e-6 if dtype == torch.float32 else 5e-3
    assert found.shape == expected.shape
    scale = expected.abs().max().clamp(min=1.0) if expected.numel() else 1.0
    assert (found.double() - expected).abs().le(bound * scale).all()


def leaf(tensor: Tensor) -> Tensor:
    return tensor.double().requires_grad_()


def expected_norm(total: Tensor, weight: Tensor, bias: Tensor | None, *, centered: bool) -> Tensor:
    if centered:
        return F.layer_norm(total, total.shape[1:], weight, bias, 1e-5)
    return rms_norm(total, weight, 1e-5) + (0 if bias is None else bias)


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rows * (rows.square().mean(1, keepdim=True) + eps).rsqrt() * weight


KINDS = ["layer", "layer-without-bias", "rms", "nothing-added", "rms-of-rms", "layer-of-rms"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_add_norm(kind: str, shape: tuple[int, int], dtype: torch.dtype):
    check_add_norm(kernels_of("cpu"), kind, shape, dtype)


def check_add_norm(
    kernels: LayerKernels,
    kind: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """The sum and the norm of a backend, and their gradients."""
    centered, width = not kind.startswith("rms"), shape[1]

    def normal(*of: int, **options: Any) -> Tensor:
        return drawn(*of, **options).to(device)

    residual, x = normal(*shape), normal(*shape, dtype=dtype, seed=1)
    x = None if kind == "nothing-added" else x
    weight, bias = normal(width, seed=2), normal(width, seed=3) if kind == "layer" else None
    x_weight, x_eps = normal(width, seed=7) if kind.endswith("of-rms") else None, 1e-2
    total, normed, mean, rstd, x_rstd = kernels.add_norm(
        residual, x, weight, bias, 1e-5, centered, dtype, x_weight, x_eps
    )
    assert total.shape == (shape if x is not None else (0,))
    total = residual if x is None else total
    given = (residual, x, weight, bias, x_weight)
    of_residual, of_x, of_weight, of_bias, of_x_weight = (
        None if one is None else leaf(one) for one in given
    )
    added = of_x if of_x_weight is None else rms_norm(of_x, of_x_weight, x_eps)
    summed = of_residual if added is None else of_residual + added
    result = expected_norm(summed, of_weight, of_bias, centered=centered)
    assert_close(total, summed.detach(), torch.float32)
    assert_close(normed, result.detach(), dtype)

    grad_normed, grad_total = normal(*shape, dtype=dtype, seed=4), normal(*shape, seed=5)
    vectors = 1 + centered + (x_weight is not None)
    sums = normal(kernels.programs(shape[0]), width * vectors, seed=6)  # dirty
    of_norm = (None, None, None) if x_weight is None else (x, x_weight, x_rstd)
    taken = (total, weight, mean, rstd, grad_normed, grad_total, sums, x is not None, *of_norm)
    grad_x, grad_residual = kernels.add_norm_grads(*taken)
    torch.autograd.backward([result, summed], [grad_normed.double(), grad_total.double()])
    assert_close(grad_residual, of_residual.grad, torch.float32)
    if x is not None:
        assert grad_x.dtype == dtype
        assert_close(grad_x, of_x.grad, dtype)
    of_vectors = kernels.column_sums(sums, None, None)
    assert_close(of_vectors[:width], of_weight.grad, torch.float32)
    if of_bias is not None:
        assert_close(of_vectors[width : 2 * width], of_bias.grad, torch.float32)
    if of_x_weight is not None:
        assert_close(of_vectors[-width:], of_x_weight.grad, torch.float32)
    taken = (total, weight, mean, rstd, grad_normed, None, sums[:, : width * (1 + centered)])
    alone = kernels.add_norm_grads(*taken, False, None, None, None)[1]
    assert_close(alone, of_residual.grad - grad_total, torch.float32)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=2)
    return x * cos[:, None] + torch.cat([-right, left], 2) * sin[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "head_size"), [(0, 8), (3, 2), (70, 12), (65, 64)])
@pytest.mark.parametrize("norms", [False, True])
def test_rotary(norms: bool, tokens: int, head_size: int, dtype: torch.dtype):
    kernels, heads, queries = kernels_of("cpu"), 5, 3
    rows = drawn(tokens, (heads + 2) * head_size, dtype=dtype)
    x = rows.view(tokens, heads + 2, head_size)[:, :heads]  # values lie behind them
    cos, sin = drawn(tokens, head_size, seed=1), drawn(tokens, head_size, seed=2)
    weights = drawn(2 * head_size, seed=3) if norms else None
    of, own = leaf(x), None if weights is None else leaf(weights)
    normed = of
    if own is not None:
        scale = (of.square().mean(2, keepdim=True) + 1e-5).rsqrt()
        rows_of = own.view(2, head_size)[[0] * queries + [1] * (heads - queries)]
        normed = of * scale * rows_of
    expected = turned(normed, cos, sin)
    out = torch.full_like(x, float("nan"))
    kernels.rotary(x, out, cos, sin, weights, queries, 1e-5)
    assert_close(out, expected.detach(), dtype)
    behind = rows[:, heads * head_size :].clone()
    before = x.clone()
    kernels.rotary(x, x, cos, sin, weights, queries, 1e-5)
    assert torch.equal(x, out)
    assert torch.equal(rows[:, heads * head_size :], behind)

    grad = drawn(tokens, heads, head_size, dtype=dtype, seed=4)
    expected.backward(grad.double())
    seen = before if norms else None
    sums = kernels.rotary_grad(grad, seen, cos, sin, weights, queries, 1e-5)
    assert_close(grad, of.grad, dtype)
    if own is not None:
        assert_close(sums.sum(0), own.grad, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gated(activation: str, shape: tuple[int, int], dtype: torch.dtype):
    kernels, width = kernels_of("cpu"), shape[1]
    gate_up = (4 * drawn(shape[0], 2 * width)).to(dtype)
    grad = drawn(*shape, dtype=dtype, seed=1)
    of = leaf(gate_up)
    expected = ACTIVATIONS[activation](of[:, :width]) * of[:, width:]
    assert_close(kernels.gated(gate_up, activation), expected.detach(), dtype)
    expected.backward(grad.double())
    assert_close(kernels.gated_grad(gate_up, grad, activation), of.grad, dtype)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gates_far_from_zero(activation: str):
    kernels = kernels_of("cpu")
    gates = torch.tensor([[-1e30, -60.0, -9.0, 0.0, 9.0, 60.0, 1e30]])
    gate_up = torch.cat([gates, torch.ones_like(gates)], 1)
    found = kernels.gated(gate_up, activation)
    torch.testing.assert_close(found, ACTIVATIONS[activation](gates), rtol=1e-6, atol=2e-6)
    grad = kernels.gated_grad(gate_up, torch.ones_like(gates), activation)
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(grad[:, :7], expected, rtol=0, atol=2e-3)
    gate_up[0, 3] = float("nan")
    assert kernels.gated(gate_up, activation).isnan().tolist() == [
        [False] * 3 + [True] + [False] * 3
    ]
