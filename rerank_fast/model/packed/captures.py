"""Calls as CUDA has captured them: replays take the buffers that were there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from rerank_fast.model.packed.gradients import add_gradients
from rerank_fast.ops.differentiated_once import differentiated_once

Result = TypeVar("Result")


def warm_up(call: Callable[[], object], device: torch.device) -> None:
    """Run what is to be captured: kernels are compiled and libraries begin outside of a graph, in
    a stream that is not the one of everybody.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)


class CudaGraph(Generic[Result]):
    """One call.

    Args:
        call: launches, and asks for no value.
        given: its input, which replays overwrite.
        pool: of the memory that all graphs share, of which one runs at a time.
        options: of torch.cuda.graph.
    """

    def __init__(
        self, call: Callable[[Tensor], Result], given: Tensor, pool: Any, **options: Any
    ) -> None:
        self._given, self._graph = given, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, **options):
            self.result = call(given)

    def __call__(self, given: Tensor) -> Result:
        """What the call gives for this input; it lasts until the next one."""
        self._given.copy_(given)
        self._graph.replay()
        return self.result


class CudaGraphs:
    """One bucket's forward and backward pass.

    Args:
        encode: gives (N, H) rows for values; launches, and asks for no value.
        values: of the shape that replays have.
        weights: whose gradients are asked for; the rows depend on each.
        pool: of the memory that all graphs share, of which one runs at a time.
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], values: Tensor, weights: list[Tensor], pool: Any
    ) -> None:
        values, self.weights = values.clone(), weights

        def back(read: Tensor, grad: Tensor) -> Sequence[Tensor]:
            return torch.autograd.grad(read, weights, grad)

        def both() -> None:
            read = encode(values)
            back(read, torch.zeros_like(read))

        warm_up(both, values.device)
        self._forward = CudaGraph(encode, values, pool)
        read = self._forward.result
        self._backward = CudaGraph(lambda grad: back(read, grad), torch.zeros_like(read), pool)

    def forward(self, values: Tensor) -> Tensor:
        """What encode gives for these values; it lasts until the next call."""
        return self._forward(values).detach()

    def backward(self, grad: Tensor) -> Sequence[Tensor]:
        """The weights' gradients, of the last forward; they last until the next call."""
        return self._backward(grad)


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
