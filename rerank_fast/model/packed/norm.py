"""The norm of rows that are wider than their products, eagerly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(wide: Tensor, module: nn.Module) -> Tensor:
    """Rows, such as the residual stream, normed in their dtype whatever the weights'."""
    if not isinstance(module, nn.LayerNorm):
        return module(wide)
    weight, bias = (None if p is None else p.to(wide.dtype) for p in (module.weight, module.bias))
    return F.layer_norm(wide, module.normalized_shape, weight, bias, module.eps)


def added(x: Tensor, module: nn.Module | None) -> Tensor:
    """What a sublayer adds to the stream, normed in fp32 at least where the model norms it."""
    return x if module is None else module(x.to(torch.promote_types(x.dtype, torch.float32)))
