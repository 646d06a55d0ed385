"""An encoder's forward and backward pass as CUDA has captured them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rerank_fast.model.packed.linear import add_gradients
from rerank_fast.ops.differentiated_once import differentiated_once


class CudaGraphs:
    """One bucket's forward and backward pass: replays take the buffers that were there.

    Args:
        encode: gives (N, H) rows for values; launches, and asks for no value.
        values: of the shape that replays have.
        weights: whose gradients are asked for; the rows depend on each.
        pool: of the memory that all graphs share, of which one runs at a time.
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], values: Tensor, weights: list[Tensor], pool: Any
    ) -> None:
        self._values, self.weights = values.clone(), weights

        def back(read: Tensor, grad: Tensor) -> Sequence[Tensor]:
            return torch.autograd.grad(read, weights, grad)

        stream = torch.cuda.Stream(values.device)
        stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(stream):  # kernels are compiled and libraries begin outside
            for _ in range(2):
                read = encode(self._values)
                back(read, torch.zeros_like(read))
        torch.cuda.current_stream(values.device).wait_stream(stream)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, pool=pool):
            read = encode(self._values)
        self._grad = torch.zeros_like(read)
        with torch.cuda.graph(self._backward, pool=pool):
            self._gradients = back(read, self._grad)
        self._read = read.detach()

    def forward(self, values: Tensor) -> Tensor:
        """What encode gives for these values; it lasts until the next call."""
        self._values.copy_(values)
        self._forward.replay()
        return self._read

    def backward(self, grad: Tensor) -> Sequence[Tensor]:
        """The weights' gradients, of the last forward; they last until the next call."""
        self._grad.copy_(grad)
        self._backward.replay()
        return self._gradients


class Claim:
    """Held by the graph of autograd whose activations lie in the memory that captures share."""


class Replayed(torch.autograd.Function):
    """The gradients of the weights are added here; the first of them stands for all."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, captured: CudaGraphs) -> Tensor:
        ctx.captured = captured
        return captured.forward(values).clone()

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        captured: CudaGraphs = ctx.captured
        for weight in captured.weights:
            if weight.grad is not None:  # it may be the buffer that is about to be written
                weight.grad = weight.grad.clone()
        add_gradients(captured.backward(grad), captured.weights)
        ctx.claim = None
        return None, None, None
