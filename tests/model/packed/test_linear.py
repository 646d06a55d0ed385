"""Products of a step: copies of weights made together, and gradients that reach the weights' own
dtypes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from benchmarks.tools.gpu_counts import counting
from rerank_fast.model.packed.linear import NarrowCopies, StepLinear
from rerank_fast.model.tokens.packing import MAX_TOKENS

_LENGTHS = torch.ones(1, dtype=torch.int64).numpy()


def three(device: str = "cpu", *, bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(8, rows, bias=bias, device=device) for rows in (4, 2, 6)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_each_weight_gets_its_rows_of_the_gradient(bias: bool, frozen: int | None):
    modules = three(bias=bias)
    if frozen is not None:
        modules[frozen].requires_grad_(False)
    x = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(5, 12, dtype=torch.bfloat16)
    out = StepLinear(modules, torch.bfloat16, 5)(x)
    weight = torch.cat([one.weight for one in modules]).detach().bfloat16()
    biases = torch.cat([one.bias for one in modules]).detach().bfloat16() if bias else None
    assert torch.equal(out, nn.functional.linear(x, weight, biases))
    out.backward(grad)
    assert torch.equal(x.grad, grad @ weight)
    products = (grad.t() @ x.detach()).float().split([4, 2, 6])
    sums = grad.sum(0).float().split([4, 2, 6])
    for number, (module, product, total) in enumerate(zip(modules, products, sums, strict=True)):
        if number == frozen:
            assert module.weight.grad is None
            continue
        assert torch.equal(module.weight.grad, product)
        if bias:
            assert torch.equal(module.bias.grad, total)


def test_gradients_of_micro_batches_are_added_up_in_fp32():
    modules = three()
    product = StepLinear(modules, torch.bfloat16, 5)
    for _ in range(2):
        product(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    product(torch.full((1, 8), 2.0**-9, dtype=torch.bfloat16)).sum().backward()
    assert all(
        torch.equal(one.weight.grad, torch.full_like(one.weight, 2 + 2.0**-9)) for one in modules
    )


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)])
def test_copies_are_those_of_casts(dtypes: tuple[torch.dtype, ...]):
    """Also of weights in several dtypes, each of which is a call of its own."""
    copies, made, expected = NarrowCopies(), [], []
    for index in range(4):
        weights = [torch.randn(rows, 3, dtype=dtypes[index % len(dtypes)]) for rows in (2, 5)]
        to = torch.bfloat16 if weights[0].dtype == torch.float32 else torch.float32
        made.append(copies.joined(weights, to))
        expected.append(torch.cat(weights).to(to))
    copies.fill()
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))


def launches(run: Any) -> dict[str, int]:
    with counting(_LENGTHS) as counts:
        counts.begin("all")
        run()
    return counts.phases["all"].by_name()


@pytest.mark.parametrize("grads", [True, False])
def test_many_weights_are_one_launch(grads: bool):
    copies = NarrowCopies()
    with torch.set_grad_enabled(grads):
        layers = [StepLinear(three("meta"), torch.bfloat16, 0, copies=copies) for _ in range(5)]
        assert launches(copies.fill) == {"_foreach_copy_": 1}
        x = torch.empty(3, 8, dtype=torch.bfloat16, device="meta")
        assert launches(lambda: [layer(x) for layer in layers]) == {"addmm": 5}


def test_a_gpus_product_and_sum_come_out_in_the_weights_dtype():
    product = StepLinear(three("meta"), torch.bfloat16, 0)
    x = torch.empty(3, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out = product(x)
    grad: Tensor = torch.empty_like(out)
    counted = launches(lambda: out.backward(grad))
    assert counted == {"mm": 2, "sum": 1}


@pytest.mark.parametrize("num_tokens", [0, MAX_TOKENS + 1])  # as they lie, and laid out anew
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_without_gradients_is_the_formula(dtype: torch.dtype, bias: bool, num_tokens: int):
    """By GELU inside of oneDNN's products, by SiLU behind them; of one module and of two."""
    torch.manual_seed(0)
    whole = nn.Linear(37, 2 * 21, bias=bias)
    parts = [nn.Linear(37, 21, bias=bias) for _ in range(2)]
    halves = [w.chunk(2) for w in whole.parameters()]
    for part, weights in zip(parts, zip(*halves, strict=True), strict=True):
        for own, weight in zip(part.parameters(), weights, strict=True):
            own.data.copy_(weight)
    x = torch.randn(13, 37).to(dtype)
    exact_rows = x.double() @ whole.weight.to(dtype).double().t()
    if whole.bias is not None:
        exact_rows += whole.bias.to(dtype).double()
    gate, up = exact_rows.chunk(2, dim=1)
    for activation in (GELUActivation(), nn.SiLU()):
        exact = activation(gate) * up
        for modules in ([whole], parts):
            with torch.no_grad():
                linear = StepLinear(modules, dtype, num_tokens, activation, gated=True)
                found = linear(x)
            error = (found.double() - exact).abs().max()
            assert found.dtype == dtype
            assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max(), error


def test_copies_are_never_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads read them while they are filled anew."""
    weight, copies = torch.tensor([2.0, 3.0], dtype=torch.bfloat16), NarrowCopies()
    made = copies.joined([weight, weight], torch.float32, plus=2**-9)
    copies.fill()
    expected = [2 + 2**-9, 3 + 2**-9] * 2
    assert made.tolist() == expected
    seen = []
    for name in ("_foreach_copy_", "_foreach_add_"):
        own = getattr(torch, name)

        def watched(*given: object, own: Any = own) -> None:
            own(*given)
            seen.append(made.tolist())

        monkeypatch.setattr(torch, name, watched)
    copies.fill()
    assert seen == [expected] * 3
