"""A model's linear layers in int8, its score head and embeddings left as they are. Inference
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rerank_fast.ops.int8_linear import Int8Weight, int8_linear, join, quantize_weight


class Int8Linear(nn.Module):
    """Stands where an nn.Linear stood."""

    def __init__(self, weight: Int8Weight) -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.values.shape
        self._joined: Int8Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in x's dtype."""
        return int8_linear(x.reshape(-1, self.in_features), self.weight).view(*x.shape[:-1], -1)

    @staticmethod
    def joined(modules: Sequence[Int8Linear]) -> Int8Linear:
        """Modules that read one input as one module. It is kept: those of a model are always
        joined in one way.
        """
        first = modules[0]
        if len(modules) == 1:
            return first
        if first._joined is None:
            one = Int8Linear(join([module.weight for module in modules]))
            # Past nn.Module, which would count it among the model's.
            object.__setattr__(first, "_joined", one)
        assert first._joined is not None
        return first._joined


def quantize_linears(model: Any) -> None:
    """Put an Int8Linear in the place of every nn.Linear of a Hugging Face model's layers, in place.

    The heads (pooler, classifier, vocabulary) stay: they are read once a pair and cost nothing.
    """
    base = model.base_model
    vocabulary = base.get_output_embeddings() if base is model else None
    for name, parent in list(base.named_modules()):
        if "pooler" in name.split("."):
            continue
        for child_name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not vocabulary:
                setattr(parent, child_name, Int8Linear(quantize_weight(child.weight, child.bias)))
