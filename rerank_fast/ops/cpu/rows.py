"""Residual norm, score head and transposed copies through the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops.cpu import address, compiled


def _norm_shape(x: Tensor, rows: Tensor | None, eps: float, dropout_p: float, seed: int) -> Any:
    return compiled().ResidualNormShape(
        rows=x.shape[0],
        width=x.shape[1],
        dropout_rows=address(rows),
        bf16=x.dtype == torch.bfloat16,
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
        num_threads=torch.get_num_threads(),
    )


def residual_norm_forward(
    x: Tensor,  # (T, H) bf16 or fp32
    residual: Tensor,  # (T, H) fp32
    weight: Tensor,  # (H,) fp32
    bias: Tensor,  # (H,) fp32
    rows: Tensor | None,  # (T,) int32
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend contract: y (T, H) fp32, y in x's dtype, mean (T,) and rstd (T,) fp32 for
    backward.
    """
    y = torch.empty_like(residual)
    narrow = torch.empty_like(x) if x.dtype == torch.bfloat16 else y.new_empty(0)
    mean, rstd = residual.new_empty(x.shape[0]), residual.new_empty(x.shape[0])
    tensors = (x, residual, weight, bias, y, narrow, mean, rstd)
    shape = _norm_shape(x, rows, eps, dropout_p, seed)
    compiled().residual_norm_forward(shape, *(tensor.data_ptr() for tensor in tensors))
    return y, narrow, mean, rstd


def residual_norm_backward(
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
    grads = (
        torch.empty_like(x),
        torch.empty_like(residual),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )
    incoming = (address(grad) for grad in (grad_y, grad_narrow))
    forward = (tensor.data_ptr() for tensor in (x, residual, weight, mean, rstd))
    outgoing = (tensor.data_ptr() for tensor in grads)
    shape = _norm_shape(x, rows, eps, dropout_p, seed)
    compiled().residual_norm_backward(shape, *forward, *incoming, *outgoing)
    return grads


def _head_rows(
    hidden: Tensor, index: Tensor | None, dense_weight: Tensor, options: tuple[Any, ...]
) -> tuple[Any, Tensor]:
    """The kernels' shape, and the rows that are read, dropped out; fp16 becomes fp32, which
    processors multiply.
    """
    activation, dropout_p, dropout_in_p, seed = options
    if hidden.dtype == torch.float16:
        hidden, index = (hidden if index is None else hidden[index]).float(), None
    num_rows = hidden.shape[0] if index is None else index.shape[0]
    shape = compiled().ScoreHeadShape(
        rows=num_rows,
        hidden=hidden.shape[1],
        width=dense_weight.shape[0],
        bf16=hidden.dtype == torch.bfloat16,
        activation=activation,
        dropout_p=dropout_p,
        dropout_in_p=dropout_in_p,
        seed=seed,
        num_threads=torch.get_num_threads(),
    )
    if index is None and dropout_in_p == 0:
        return shape, hidden
    index = None if index is None else index.long().contiguous()
    x = hidden.new_empty(num_rows, hidden.shape[1])
    source = (hidden.data_ptr(), hidden.stride(0), hidden.shape[0])
    compiled().score_head_gather(shape, *source, address(index), x.data_ptr())
    return shape, x


def score_head_forward(
    hidden: Tensor,  # (T, H) fp32, bf16 or fp16, each row one run of memory
    index: Tensor | None,  # (N,)
    dense_weight: Tensor,  # (D, H)
    dense_bias: Tensor | None,  # (D,)
    out_weight: Tensor,  # (1, D)
    out_bias: Tensor | None,  # (1,)
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The backend contract: the scores (N,) fp32; and the dense layer's result (N, D) for backward.

    A third matrix product would cost more than these few rows beside the hidden states.
    """
    shape, x = _head_rows(hidden, index, dense_weight, options)
    bias = None if dense_bias is None else dense_bias.to(x.dtype)
    dense = torch.nn.functional.linear(x, dense_weight.to(x.dtype), bias)
    scores = torch.empty(dense.shape[0], dtype=torch.float32)
    weight, last = out_weight.float(), None if out_bias is None else out_bias.float()
    compiled().score_head_dot(
        shape, dense.data_ptr(), weight.data_ptr(), address(last), scores.data_ptr()
    )
    return scores, dense


def score_head_backward(
    grad_scores: Tensor,  # (N,) fp32
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    out_weight: Tensor,
    dense: Tensor,  # (N, D)
    wants: list[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of hidden, dense_weight, dense_bias, out_weight and
    out_bias.

    One that is not wanted is empty.
    """
    d_dense, weight = torch.empty_like(dense), out_weight.float()
    vectors = [grad_scores.new_empty(dense.shape[1]) for _ in range(2)]
    shape, x = _head_rows(hidden, index, dense_weight, options)
    addresses = (tensor.data_ptr() for tensor in (dense, weight, grad_scores, d_dense, *vectors))
    compiled().score_head_dot_backward(shape, *addresses)
    grads = [hidden.new_empty(0) for _ in range(5)]
    if wants[0]:
        rows = torch.mm(d_dense, dense_weight.to(x.dtype))
        if options[2] > 0:
            compiled().score_head_gather(
                shape, rows.data_ptr(), rows.stride(0), len(rows), 0, rows.data_ptr()
            )
        grads[0] = rows = rows.to(hidden.dtype)
        if index is not None:
            grads[0] = torch.zeros(hidden.shape, dtype=hidden.dtype).index_copy_(
                0, index.long(), rows
            )
    if wants[1]:
        grads[1] = torch.mm(d_dense.t(), x).to(hidden.dtype)
    for place, grad in enumerate((vectors[0], vectors[1][None], grad_scores.sum()[None]), start=2):
        if wants[place]:
            grads[place] = grad.to(hidden.dtype)
    return tuple(grads)  # type: ignore[return-value]


def transposed(x: Tensor) -> Tensor:
    """A (columns, rows) copy of a contiguous (rows, columns) matrix of 16-bit numbers."""
    result = x.new_empty(x.shape[1], x.shape[0])
    compiled().transpose(*x.shape, torch.get_num_threads(), x.data_ptr(), result.data_ptr())
    return result
