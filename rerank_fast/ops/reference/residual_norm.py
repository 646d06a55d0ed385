"""The specification of LayerNorm(residual + dropout(x))."""

from __future__ import annotations

import torch
from torch import Tensor

from rerank_fast.ops.dropout import dropout_factors

HALVES = (torch.bfloat16, torch.float16)  # what the second result comes in; x in fp32 needs none


def _dropped(
    x: Tensor, residual: Tensor, rows: Tensor | None, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor | None]:
    """residual + dropout(x), and the factors of the dropout."""
    if dropout_p == 0:
        return residual + x.to(residual.dtype), None
    rows = torch.arange(x.shape[0], device=x.device) if rows is None else rows
    factors = dropout_factors(seed, 0, rows, x.shape[1], dropout_p).to(residual.dtype)
    return residual + factors * x.to(residual.dtype), factors


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend contract: y in the residual's dtype and in x's, mean (T,) and rstd (T,)."""
    total, _ = _dropped(x, residual, rows, dropout_p, seed)
    mean = total.mean(dim=1)
    rstd = (total.var(dim=1, unbiased=False) + eps).rsqrt()
    y = (total - mean[:, None]) * rstd[:, None] * weight + bias
    return y, y.to(x.dtype) if x.dtype in HALVES else y.new_empty(0), mean, rstd


def backward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_y: Tensor | None,
    grad_narrow: Tensor | None,
    rows: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of x, residual, weight and bias."""
    total, factors = _dropped(x, residual, rows, dropout_p, seed)
    unit = (total - mean[:, None]) * rstd[:, None]
    grads = [grad.to(residual.dtype) for grad in (grad_y, grad_narrow) if grad is not None]
    grad = torch.stack(grads).sum(dim=0) if grads else torch.zeros_like(residual)
    weighted = grad * weight
    along = (weighted * unit).mean(dim=1, keepdim=True)
    d_total = rstd[:, None] * (weighted - weighted.mean(dim=1, keepdim=True) - unit * along)
    dx = d_total.clone() if factors is None else d_total * factors
    return dx.to(x.dtype), d_total, (grad * unit).sum(dim=0), grad.sum(dim=0)
