"""The optimizer of a run: one of torch's by name, its groups, and what it keeps for each weight."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rerank_fast.training.config import TrainingConfig

_KINDS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}
# Settings of their own in TrainingConfig, or of each group.
_NAMED = ("params", "lr", "weight_decay", "betas")


def make_optimizer(
    weights: Mapping[str, Tensor], depths: Mapping[str, int], config: TrainingConfig
) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over the weights in groups; see parameter_groups.

    Raises:
        ValueError: an option that this optimizer does not have, or a value that it refuses.
    """
    kind = _KINDS[config.optimizer]
    accepted = inspect.signature(kind).parameters
    options: dict[str, Any] = {}
    if "betas" in accepted:
        options = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if "fused" in accepted and not {"foreach", "fused"} & set(config.optimizer_options):
        options["fused"] = True
    free = [name for name in accepted if name not in (*_NAMED, *options)]
    if unknown := [name for name in config.optimizer_options if name not in (*free, "fused")]:
        raise ValueError(
            f"optimizer_options: {config.optimizer} has no option {unknown[0]} that is not a "
            f"setting of its own; there are {', '.join(free)}"
        )
    groups = parameter_groups(
        weights,
        depths,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        decay=config.layer_lr_decay,
    )
    make: Any = kind
    try:
        return make(groups, lr=config.learning_rate, **{**options, **config.optimizer_options})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"optimizer {config.optimizer} with optimizer_options {config.optimizer_options}: "
            f"{error}"
        ) from error


def parameter_groups(
    weights: Mapping[str, Tensor],
    depths: Mapping[str, int],
    *,
    learning_rate: float,
    weight_decay: float,
    decay: float,
) -> list[dict[str, Any]]:
    """Optimizer groups: matrices decay, biases and norms don't; each layer down learns `decay`
    times as fast.
    """
    top = max(depths.values())
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, weight in weights.items():
        below = top - depths[name] if decay != 1 else 0
        groups.setdefault((below, weight.dim() >= 2), []).append(weight)
    return [
        {
            "params": chosen,
            "lr": learning_rate * decay**below,
            "weight_decay": weight_decay if matrices else 0.0,
        }
        for (below, matrices), chosen in sorted(
            groups.items(), key=lambda item: (item[0][0], not item[0][1])
        )
    ]


def state_like(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps for such a weight from its first step on: names, dtypes, shapes.

    Values mean nothing: a copy of the optimizer takes a step with a stand-in for the weight.
    """
    kind: Any = type(optimizer)
    accepted = inspect.signature(kind).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    # Without memory, but for the one that reads values in its step.
    device = "cpu" if kind is torch.optim.Adafactor else "meta"
    alike = nn.Parameter(torch.zeros(weight.shape, dtype=weight.dtype, device=device))
    alike.grad = torch.zeros_like(alike)
    one_by_one = {name: False for name in ("foreach", "fused") if name in accepted}
    trial = kind([alike], **{**defaults, **one_by_one})
    trial.step()
    return {name: value for name, value in trial.state[alike].items() if isinstance(value, Tensor)}
