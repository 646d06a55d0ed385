"""Activations that a file gives by the name of a class: PyTorch's own, and no other code."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import nn

from rerank_fast.model.storage.files import named


def is_torchs(name: str) -> bool:
    """Whether a class of this name would be one of torch.nn."""
    module = name.rpartition(".")[0]
    return module == "torch.nn" or module.startswith("torch.nn.modules.")


def make_activation(name: str, where: str) -> nn.Module:
    """The activation of a name that is_torchs; where has the name.

    Raises:
        ValueError: torch has no such class, it is no activation, or it needs arguments.
    """
    module, _, attribute = name.rpartition(".")
    with named(f"{where} names the activation {name}, which torch can't give"):
        kind = getattr(import_module(module), attribute)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError("it is no torch.nn.Module")
        activation: nn.Module = kind()
        activation(torch.zeros(1))  # of one score, as of any number of them
    return activation
