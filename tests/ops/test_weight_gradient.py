"""The gradient of a product's weight, with what tiles multiply laid out anew."""

from __future__ import annotations

import pytest
import torch

from rerank_fast.ops import cpu, weight_gradient
from rerank_fast.ops.cpu import rows as cpu_rows

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="needs the compiled kernels")


@needs_kernels
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 63, 64, 65, 200])
@pytest.mark.parametrize("columns", [1, 8, 13, 48])
def test_transposed_copies_hold_every_number(rows: int, columns: int):
    x = torch.arange(rows * columns, dtype=torch.int16).view(rows, columns).view(torch.bfloat16)
    copy = cpu_rows.transposed(x)
    assert copy.is_contiguous()
    assert torch.equal(copy.view(torch.int16), x.view(torch.int16).t())


@needs_kernels
@pytest.mark.parametrize("shapes", [(48, 96), (96, 48), (48, 48), (5, 3)])
@pytest.mark.parametrize("rows", [0, 1, 203])
def test_in_tiles_it_is_the_product_as_without(
    shapes: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
):
    """The way round tiles on any processor, also one without them."""
    grad, x = (torch.randn(rows, width).bfloat16() for width in shapes)
    exact = grad.double().t() @ x.double()
    scale = grad.abs().double().t() @ x.abs().double()  # of the sums' terms
    for in_tiles in (False, True):
        monkeypatch.setattr(weight_gradient, "_in_tiles", lambda grad, answer=in_tiles: answer)
        found = weight_gradient.weight_gradient(grad, x)
        assert (found.shape, found.dtype) == (exact.shape, torch.bfloat16)
        assert found.is_contiguous()
        assert ((found.double() - exact).abs() <= 2.0**-8 * scale).all()


def test_other_dtypes_and_tracing_go_without_the_copy():
    grad, x = torch.randn(20, 4), torch.randn(20, 6)
    assert torch.equal(weight_gradient.weight_gradient(grad, x), grad.t() @ x)
    meta = torch.empty(20, 4, device="meta", dtype=torch.bfloat16)
    assert weight_gradient.weight_gradient(meta, meta).shape == (4, 4)


@needs_kernels
def test_a_traced_copy_has_the_shape_and_strides_of_a_real_one():
    x = torch.randn(6, 4).bfloat16()
    torch.library.opcheck(torch.ops.rerank_fast.transposed.default, (x,))
    torch.library.opcheck(torch.ops.rerank_fast.transposed.default, (x.t(),))
