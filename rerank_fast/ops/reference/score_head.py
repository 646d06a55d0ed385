"""The specification of the score head: gather -> dense -> activation -> dropout -> dot."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rerank_fast.ops.dropout import dropout_factors


def _active(dense: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation and its slope."""
    if activation == "tanh":
        active = dense.tanh()
        return active, 1 - active * active
    if activation == "gelu":
        below = (1 + torch.erf(dense / math.sqrt(2))) / 2
        return dense * below, below + dense * torch.exp(-dense * dense / 2) / math.sqrt(2 * math.pi)
    if activation == "relu":
        return dense.relu(), (~(dense <= 0)).to(dense.dtype)  # of NaN 1, as torch has it
    return dense, torch.ones_like(dense)


def _dropped(x: Tensor, p: float, seed: int, stream: int) -> Tensor | float:
    """The factors of a dropout of the (N, columns) of x."""
    if p == 0:
        return 1.0
    return dropout_factors(
        seed, stream, torch.arange(x.shape[0], device=x.device), x.shape[1], p
    ).to(x.dtype)


def _dense(
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    dropout_in_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor | float]:
    """The rows that are read, dropped out, the dense layer's result, and the factors."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    x = (hidden if index is None else hidden[index]).to(wide)
    factors = _dropped(x, dropout_in_p, seed, 1)
    x = x * factors
    return (
        x,
        F.linear(x, dense_weight.to(wide), None if dense_bias is None else dense_bias.to(wide)),
        factors,
    )


def forward(
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_in_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The backend contract: the scores (N,), of fp64 in it, else in fp32; nothing for backward."""
    _, dense, _ = _dense(hidden, index, dense_weight, dense_bias, dropout_in_p, seed)
    active, _ = _active(dense, activation)
    active = active * _dropped(active, dropout_p, seed, 0)
    scores = F.linear(
        active, out_weight.to(dense.dtype), None if out_bias is None else out_bias.to(dense.dtype)
    )
    return scores.squeeze(1), hidden.new_empty(0)


def backward(
    grad_scores: Tensor,
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    out_weight: Tensor,
    kept_dense: Tensor,
    wants: list[bool],
    activation: str,
    dropout_p: float,
    dropout_in_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of hidden and the weights; one not wanted is empty."""
    x, dense, factors = _dense(hidden, index, dense_weight, dense_bias, dropout_in_p, seed)
    active, slope = _active(dense, activation)
    kept = grad_scores[:, None] * _dropped(active, dropout_p, seed, 0)
    d_dense = kept * out_weight.to(dense.dtype) * slope
    grads = [hidden.new_empty(0) for _ in wants]
    if wants[0]:
        d_rows = d_dense @ dense_weight.to(dense.dtype) * factors
        grads[0] = (
            d_rows
            if index is None
            else d_rows.new_zeros(hidden.shape).index_copy(0, index.long(), d_rows)
        )
    if wants[1]:
        grads[1] = d_dense.t() @ x
    if wants[2]:
        grads[2] = d_dense.sum(dim=0)
    if wants[3]:
        grads[3] = (kept * active).sum(dim=0, keepdim=True)
    if wants[4]:
        grads[4] = grad_scores.sum(dim=0, keepdim=True)
    return tuple(grad.to(hidden.dtype) for grad in grads)  # type: ignore[return-value]
