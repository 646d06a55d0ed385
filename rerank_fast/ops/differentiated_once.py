"""Gradients that can't be differentiated again say so, wherever the second derivative comes
from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

_Backward = Callable[..., tuple[Any, ...]]


class _Refused(torch.autograd.Function):
    """The last `count` of the tensors, as results that depend on all of them and have no
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[len(tensors) - count :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "this operation's gradient can't be differentiated: its second derivative is not known"
        )


def differentiated_once(backward: _Backward) -> _Backward:
    """Decorates the backward of an autograd.Function whose kernels have no second derivative.

    Its gradients under create_graph raise RuntimeError when they are differentiated, by whatever
    they depend on: the inputs, which the Function must have saved, and the incoming gradients.
    PyTorch's once_differentiable lets them be constants where no incoming gradient is part of a
    graph, as behind a loss: a gradient penalty would vanish.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        # Grad mode is on under create_graph only, and while a program is traced.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        known = [output for output in outputs if output is not None]
        sources = [
            tensor
            for tensor in (*ctx.saved_tensors, *grads)
            if tensor is not None and tensor.requires_grad
        ]
        refused = iter(_Refused.apply(len(known), *sources, *known))
        return tuple(None if output is None else next(refused) for output in outputs)

    return once
