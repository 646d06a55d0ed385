"""Clipping by the norm of all gradients, in as few tensors as they lie in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def clip_gradients(weights: Iterable[Tensor], limit: float) -> Tensor:
    """Multiply all gradients by one factor so that their norm is at most a limit, as
    torch.nn.utils.clip_grad_norm_ does, to rounding.

    A layer that trains as one function leaves the gradients of its vectors as parts of one tensor,
    and so those of queries, keys and values: each such tensor is taken as one, a third as many.

    Args:
        weights: those without a gradient are left out.
        limit: infinity clips nothing.

    Returns:
        () the norm before, on the gradients' device; DTensor where they are.
    """
    weights = list(weights)
    gradients = [one.grad for one in weights if one.grad is not None]
    if not all(type(one) is Tensor for one in gradients) or not gradients:
        return nn.utils.clip_grad_norm_(weights, limit)  # of shards: they know their processes
    wholes = _wholes(gradients)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(wholes)))
    torch._foreach_mul_(wholes, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm


def _wholes(gradients: list[Tensor]) -> list[Tensor]:
    """Tensors that hold just these numbers: in the place of parts what they are all of."""
    parts: dict[int, list[Tensor]] = {}
    for one in gradients:
        base = one._base
        parts.setdefault(id(one if base is None else base), []).append(one)
    found: list[Tensor] = []
    for of_one in parts.values():
        base = of_one[0]._base
        if base is not None and base.numel() == sum(one.numel() for one in of_one):
            found.append(base)
        else:
            found += of_one
    return found
