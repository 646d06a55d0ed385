"""What CUDA would capture is stood in for by what runs again over the same buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor


class StandIn:
    """Computes at every replay, in buffers of its own as a captured graph does."""

    made: ClassVar[list[StandIn]] = []

    def __init__(
        self, encode: Callable[[Tensor], Tensor], values: Tensor, weights: list[Tensor], pool: Any
    ) -> None:
        self.encode, self.values, self.weights = encode, values.clone(), weights
        self.gradients: list[Tensor] = []
        encode(self.values)  # to warm up
        self.made.append(self)

    def forward(self, values: Tensor) -> Tensor:
        self.values.copy_(values)
        with torch.enable_grad():
            self.read = self.encode(self.values)
        return self.read.detach()

    def backward(self, grad: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(self.read, self.weights, grad)
        if not self.gradients:
            self.gradients = [torch.empty_like(one) for one in found]
        torch._foreach_copy_(self.gradients, list(found))
        return self.gradients


class CallStandIn:
    """Of a graph of one call: its result lies in one buffer, which the next call overwrites."""

    made: ClassVar[list[CallStandIn]] = []

    def __init__(
        self, call: Callable[[Tensor], Tensor], given: Tensor, pool: Any, **options: Any
    ) -> None:
        self.call, self.given = call, given
        self.result = call(given).clone()
        self.made.append(self)

    def __call__(self, given: Tensor) -> Tensor:
        self.given.copy_(given)
        return self.result.copy_(self.call(self.given))
