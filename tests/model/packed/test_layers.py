"""What layers of every kind share."""

from __future__ import annotations

import pytest
import torch

from rerank_fast.model.packed.layers import rotated


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_heads_halves_are_turned_as_pairs(dtype: torch.dtype, grads: bool) -> None:
    """Rows that lie among others', as queries and keys do; they stay what they were."""
    torch.manual_seed(0)
    x = torch.randn(5, 7, 6).to(dtype)[:, 1:4]
    before = x.clone()
    angles = torch.randn(5, 3).repeat(1, 2)
    with torch.set_grad_enabled(grads):
        found = rotated(x, angles.cos(), angles.sin())
    pairs = torch.complex(*x.double().chunk(2, dim=2))
    turned = pairs * torch.polar(torch.ones(5, 1, 3).double(), angles[:, None, :3].double())
    exact = torch.cat([turned.real, turned.imag], dim=2)
    assert found.dtype == dtype
    assert torch.equal(x, before)
    error = (found.double() - exact).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * exact.abs().max(), error
