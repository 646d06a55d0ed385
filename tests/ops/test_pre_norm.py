"""The C++ kernels between the products of a pre-norm layer beside PyTorch in fp64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rerank_fast.ops.cpu import available, unavailable_reason
from rerank_fast.ops.pre_norm import kernels_of

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


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
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
    scale = (total.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    return total * scale * weight + (0 if bias is None else bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["layer", "layer-without-bias", "rms", "nothing-added"])
def test_add_norm(kind: str, shape: tuple[int, int], dtype: torch.dtype):
    kernels, centered = kernels_of("cpu"), kind != "rms"
    width = shape[1]
    residual, x = normal(*shape), normal(*shape, dtype=dtype, seed=1)
    x = None if kind == "nothing-added" else x
    weight, bias = normal(width, seed=2), normal(width, seed=3) if kind == "layer" else None
    total, normed, mean, rstd = kernels.add_norm(residual, x, weight, bias, 1e-5, centered, dtype)
    assert total.shape == (shape if x is not None else (0,))
    total = residual if x is None else total
    inputs = [leaf(residual), None if x is None else leaf(x), leaf(weight)]
    inputs.append(None if bias is None else leaf(bias))
    summed = inputs[0] if x is None else inputs[0] + inputs[1]
    result = expected_norm(summed, *inputs[2:], centered=centered)
    assert_close(total, summed.detach(), torch.float32)
    assert_close(normed, result.detach(), dtype)

    grad_normed, grad_total = normal(*shape, dtype=dtype, seed=4), normal(*shape, seed=5)
    sums = normal(kernels.programs(shape[0]), width * (2 if centered else 1), seed=6)  # dirty
    taken = (total, weight, mean, rstd, grad_normed, grad_total, sums, x is not None)
    grad_x, grad_residual = kernels.add_norm_grads(*taken)
    torch.autograd.backward([result, summed], [grad_normed.double(), grad_total.double()])
    assert_close(grad_residual, inputs[0].grad, torch.float32)
    if x is not None:
        assert grad_x.dtype == dtype
        assert_close(grad_x, inputs[1].grad, dtype)
    of_vectors = kernels.column_sums(sums, None, None)
    assert_close(of_vectors[:width], inputs[2].grad, torch.float32)
    if bias is not None:
        assert_close(of_vectors[width:], inputs[3].grad, torch.float32)
    taken = (total, weight, mean, rstd, grad_normed, None, sums, False)
    alone, expected = kernels.add_norm_grads(*taken)[1], inputs[0].grad - grad_total
    assert_close(alone, expected, torch.float32)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=2)
    return x * cos[:, None] + torch.cat([-right, left], 2) * sin[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "head_size"), [(0, 8), (3, 2), (70, 12), (65, 64)])
@pytest.mark.parametrize("norms", [False, True])
def test_rotary(norms: bool, tokens: int, head_size: int, dtype: torch.dtype):
    kernels, heads, queries = kernels_of("cpu"), 5, 3
    rows = normal(tokens, (heads + 2) * head_size, dtype=dtype)
    x = rows.view(tokens, heads + 2, head_size)[:, :heads]  # values lie behind them
    cos, sin = normal(tokens, head_size, seed=1), normal(tokens, head_size, seed=2)
    weights = normal(2 * head_size, seed=3) if norms else None
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

    grad = normal(tokens, heads, head_size, dtype=dtype, seed=4)
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
    gate_up = (4 * normal(shape[0], 2 * width)).to(dtype)
    grad = normal(*shape, dtype=dtype, seed=1)
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
