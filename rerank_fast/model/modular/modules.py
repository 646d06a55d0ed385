"""sentence-transformers' modules behind the encoder: each reads features by name and adds its own.

Names of parameters are theirs, so that a module's file is read by both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_fast.model.modular.pooling import Pooling

Features = dict[str, Tensor]
_POOLED = "sentence_embedding"


class Dense(nn.Module):
    """A linear layer and its activation, with the input added where the config asks for it."""

    def __init__(self, config: dict[str, Any], activation: nn.Module) -> None:
        super().__init__()
        width, out = int(config["in_features"]), int(config["out_features"])
        self.linear = nn.Linear(width, out, bias=bool(config.get("bias", True)))
        self.activation_function = activation
        self.module_input_name: str = config.get("module_input_name") or _POOLED
        self.module_output_name: str = config.get("module_output_name") or self.module_input_name
        self.use_residual = bool(config.get("use_residual", False))
        if self.use_residual and width != out:
            self.residual = nn.Linear(width, out, bias=False)

    def forward(self, features: Features) -> Features:
        x = features[self.module_input_name]
        out = self.activation_function(self.linear(x))
        if self.use_residual:
            out = out + (self.residual(x) if hasattr(self, "residual") else x)
        return features | {self.module_output_name: out}


class LayerNorm(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(int(config["dimension"]))

    def forward(self, features: Features) -> Features:
        return features | {_POOLED: self.norm(features[_POOLED])}


class Normalize(nn.Module):
    """To unit length."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.module_input_name: str = config.get("module_input_name") or _POOLED
        self.module_output_name: str = config.get("module_output_name") or self.module_input_name

    def forward(self, features: Features) -> Features:
        if self.module_input_name not in features:
            return features
        return features | {
            self.module_output_name: F.normalize(features[self.module_input_name], dim=-1)
        }


class Dropout(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.dropout_layer = nn.Dropout(float(config.get("dropout", 0.2)))

    def forward(self, features: Features) -> Features:
        return features | {_POOLED: self.dropout_layer(features[_POOLED])}


class Float32Linear(nn.Linear):
    """Multiplies in fp32 whatever the dtypes of its weights and its input, and gives fp32."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), bias)


_KINDS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "Pooling": Pooling,
    "LayerNorm": LayerNorm,
    "Normalize": Normalize,
    "Dropout": Dropout,
}


def make_module(
    kind: str, config: dict[str, Any], make_activation: Callable[[Any], nn.Module]
) -> nn.Module | None:
    """A module of the name of a class of sentence-transformers; None of one that is theirs
    alone.
    """
    if kind == "Dense":
        return Dense(config, make_activation(config.get("activation_function", "torch.nn.Tanh")))
    make = _KINDS.get(kind)
    return None if make is None else make(config)
