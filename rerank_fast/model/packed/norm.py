"""The norm of rows that are wider than their products: by itself, and behind a sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_fast.model.packed.layers import Rows, share_of
from rerank_fast.model.packed.linear import NarrowCopies, StepLinear
from rerank_fast.ops.int8_linear import int8_norm
from rerank_fast.ops.residual_norm import residual_norm


def norm(wide: Tensor, module: nn.Module) -> Tensor:
    """Rows, such as the residual stream, normed eagerly in their dtype whatever the weights'."""
    if not isinstance(module, nn.LayerNorm):
        return module(wide)
    weight, bias = (None if p is None else p.to(wide.dtype) for p in (module.weight, module.bias))
    return F.layer_norm(wide, module.normalized_shape, weight, bias, module.eps)


def added(x: Tensor, module: nn.Module | None) -> Tensor:
    """What a sublayer adds to the stream, normed in fp32 at least where the model norms it."""
    return x if module is None else module(x.to(torch.promote_types(x.dtype, torch.float32)))


@dataclass(frozen=True)
class NormWeights:
    """Of a LayerNorm, in the residual stream's dtype."""

    weight: Tensor
    bias: Tensor
    eps: float


def ready_norm(
    norm: nn.LayerNorm, dtype: torch.dtype, copies: NarrowCopies | None, *, trains: bool
) -> nn.LayerNorm | NormWeights:
    """A norm whose weights need no cast in each micro-batch.

    With gradients on they must reach the module's own, unless the layer trains as one function.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if copies is None or (torch.is_grad_enabled() and not trains):
        return norm
    if norm.weight.dtype == wide:
        # A module's attributes take ten times as long.
        return NormWeights(norm.weight, norm.bias, norm.eps) if trains else norm
    return NormWeights(
        copies.joined([norm.weight], wide), copies.joined([norm.bias], wide), norm.eps
    )


def add_norm(
    wide: Tensor,
    linear: StepLinear,
    x: Rows,
    norm: nn.LayerNorm | NormWeights,
    dropout: nn.Dropout | None,
    seed: int,
    rows: Tensor | None,
) -> tuple[Tensor, Rows]:
    """norm(wide + dropout(linear(x))) in wide's dtype and in what products read."""
    weight, bias = norm.weight.to(wide.dtype), norm.bias.to(wide.dtype)
    if linear.int8 is not None and share_of(dropout) == 0:
        return int8_norm(x, linear.int8, wide, weight, bias, eps=norm.eps)
    return residual_norm(
        linear(x),
        wide,
        weight,
        bias,
        eps=norm.eps,
        dropout_p=share_of(dropout),
        seed=seed,
        rows=rows,
    )
