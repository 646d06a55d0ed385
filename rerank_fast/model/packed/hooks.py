"""Whether a module must be called for what it does, or may be computed from its weights."""

from __future__ import annotations

from torch import nn


def must_be_called(module: nn.Module) -> bool:
    """Whether somebody changed what a call does: by hooks, or a forward of its own, as Accelerate
    puts on one.
    """
    return has_hooks(module) or "forward" in vars(module)


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
