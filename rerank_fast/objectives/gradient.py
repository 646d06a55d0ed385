"""A loss whose gradient is known in closed form: one node in the graph, not one an operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops.differentiated_once import differentiated_once


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(scores, gradient)
        return total.view_as(total)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        scores, gradient = ctx.saved_tensors
        # In fp32: a loss scale then reaches fp16 gradients before they are rounded.
        return (gradient * grad_total).to(scores.dtype), None, None


def with_gradient(
    scores: Tensor,  # (N,)
    total: Tensor,  # ()
    gradient: Tensor,  # (N,)
) -> Tensor:
    """The total, with `gradient` as its derivative by the scores, which goes back in their dtype.

    Differentiating twice raises RuntimeError.
    """
    return _WithGradient.apply(scores, total, gradient)
