"""How gradients reach the parameters of a layer: in their own dtypes, added up there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rerank_fast.ops.weight_gradient import weight_gradient


def in_own_dtypes(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients in the dtypes of their parameters."""
    return [
        gradient
        if gradient is None or gradient.dtype is weight.dtype
        else gradient.to(weight.dtype)
        for gradient, weight in zip(gradients, parameters, strict=True)
    ]


class Trained(Protocol):
    """A layer's step that is one function of autograd."""

    trained: list[Tensor]
    adds_gradients: bool


def parameters_through(step: Trained, wide: Tensor) -> list[Tensor]:
    """The parameters that autograd is to know of: none where the function adds their gradients
    itself, which it is asked for only if its rows have one. Autograd alone calls what
    register_hook left with a parameter.
    """
    adds = step.adds_gradients and wide.requires_grad
    return [] if adds and not any(one._backward_hooks for one in step.trained) else step.trained


def pass_on(
    step: Trained, gradients: Sequence[Tensor | None], needs_input_grad: Sequence[bool]
) -> list[Tensor | None]:
    """A function's gradients of the parameters that it was given by parameters_through."""
    if needs_input_grad:
        return in_own_dtypes(gradients, step.trained)
    add_gradients(gradients, step.trained)
    return []


def add_gradients(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
    """Add gradients to what their parameters have, as the nodes of autograd that end in these do,
    which take ten times as long for each: theirs is a fifth of the host's time of a backward pass.
    """
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is None or not parameter.requires_grad:
            continue
        if gradient.dtype is not parameter.dtype:
            gradient = gradient.to(parameter.dtype)
        before = parameter.grad
        parameter.grad = gradient if before is None else before.add_(gradient)
        hooks: Any = parameter._post_accumulate_grad_hooks
        if hooks:
            for hook in hooks.values():
                hook(parameter)


def _widens(grad: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product or sum of 16-bit numbers comes out in fp32 at once.

    That is one launch instead of two, and nothing is rounded to 16 bits in between. ROCm's library
    has no such product, and torch.compile no shape of it.
    """
    served = grad.is_meta or (grad.is_cuda and torch.version.hip is None)
    return served and dtype == torch.float32 and not torch.compiler.is_compiling()


def product_weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a weight in its dtype, from its product's gradient and rows."""
    if _widens(grad, dtype):
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return weight_gradient(grad, x).to(dtype)


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the rows of a product's gradient, in the bias's dtype."""
    return grad.sum(0, dtype=dtype) if _widens(grad, dtype) else grad.sum(0).to(dtype)


def split_rows(gradient: Tensor, rows: list[int]) -> Sequence[Tensor]:
    return [gradient] if len(rows) == 1 else gradient.split_with_sizes(rows)


def leaf_for(shared: Tensor) -> Tensor | None:
    """A leaf to stand for a tensor that was made from weights; None where there is nothing to
    cut.
    """
    if not shared.requires_grad or shared.is_leaf:
        return None
    return shared.detach().requires_grad_()
