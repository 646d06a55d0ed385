"""Which parameters are trained, and how deep each lies."""

from __future__ import annotations

import fnmatch
import re

from torch import nn

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe)\.")


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Depth of every parameter: 0 for embeddings, i + 1 for layer i, layers + 1 for the head and
    what lies near.
    """
    found = {name: _LAYER.search(name) for name, _ in model.named_parameters()}
    layers = 1 + max((int(match[1]) for match in found.values() if match), default=-1)
    return {
        name: int(match[1]) + 1 if match else 0 if _EMBEDDINGS.search(name) else layers + 1
        for name, match in found.items()
    }


def freeze(model: nn.Module, *, num_layers: int, patterns: list[str]) -> None:
    """Take parameters out of training: embeddings and the first layers, and those whose names match
    a pattern.

    Raises:
        ValueError: more layers than there are, a pattern that matches none (names some that there
            are), or nothing left to train.
    """
    depths = layer_depths(model)
    layers = max(depths.values()) - 1
    if num_layers > layers:
        raise ValueError(f"freeze_layers is {num_layers}, but the model has {layers} layers")
    for pattern in patterns:
        if not fnmatch.filter(depths, pattern):
            some = ", ".join(list(depths)[:: max(len(depths) // 5, 1)])
            raise ValueError(
                f"freeze: no parameter's name matches {pattern!r}; there are {some} and others"
            )
    frozen = {
        name
        for name, depth in depths.items()
        if (depth <= num_layers and num_layers > 0)
        or any(fnmatch.fnmatch(name, one) for one in patterns)
    }
    parameters = dict(model.named_parameters())
    if not any(one.requires_grad and name not in frozen for name, one in parameters.items()):
        raise ValueError("freeze leaves no parameter to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
