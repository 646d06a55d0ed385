"""Linear layers of a step: weights cast, joined and laid out once, gradients added up in the
weights' own dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from rerank_fast.model.packed.gradients import bias_gradient, product_weight_gradient, split_rows
from rerank_fast.model.packed.hooks import must_be_called
from rerank_fast.model.precision.int8 import Int8Linear
from rerank_fast.model.tokens.packing import MAX_TOKENS
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.int8_linear import Int8Rows, Int8Weight, int8_gelu, int8_linear

Activation: TypeAlias = Callable[[Tensor], Tensor]


class _NarrowLinear(torch.autograd.Function):
    """A product in 16 bits whose weight gradients reach the wider weights in their own dtypes.

    The narrow copy is made once a step and shared by its micro-batches; were it part of the graph,
    their gradients would be added up in 16 bits. It holds the rows of one weight after the other,
    each with a bias or none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, narrow_weight: Tensor, narrow_bias: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, narrow_weight)
        # The weights, then as many biases or none.
        ctx.num_weights = len(parameters) if narrow_bias is None else len(parameters) // 2
        ctx.dtypes = [one.dtype for one in parameters]
        ctx.rows = [one.shape[0] for one in parameters[: ctx.num_weights]]
        return F.linear(x, narrow_weight, narrow_bias)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow_weight = ctx.saved_tensors
        wants_x, _, _, *wants = ctx.needs_input_grad
        count, dtypes = ctx.num_weights, ctx.dtypes
        parts: list[Tensor | None] = [None] * len(wants)
        if any(wants[:count]):
            parts[:count] = split_rows(product_weight_gradient(grad, x, dtypes[0]), ctx.rows)
        if any(wants[count:]):
            parts[count:] = split_rows(bias_gradient(grad, dtypes[count]), ctx.rows)
        gradients = [
            part.to(dtype) if want and part is not None else None
            for part, want, dtype in zip(parts, wants, dtypes, strict=True)
        ]
        return grad @ narrow_weight if wants_x else None, None, None, *gradients


class NarrowCopies:
    """Copies of weights in a step's dtype, all made at once: one launch for many on a GPU."""

    def __init__(self) -> None:
        # By the dtypes of both: one kernel copies from one to another.
        self._made: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        # By what is added to them.
        self._raised: dict[float, tuple[list[Tensor], list[Tensor]]] = {}

    def joined(self, weights: Sequence[Tensor], dtype: torch.dtype, *, plus: float = 0.0) -> Tensor:
        """Room for the rows of one weight after the other, which fill() writes with plus added."""
        rows = [one.shape[0] for one in weights]
        joined = torch.empty(
            sum(rows), *weights[0].shape[1:], dtype=dtype, device=weights[0].device
        )
        for copy, weight in zip(joined.split(rows), weights, strict=True):
            copies, originals = (
                self._raised.setdefault(plus, ([], []))
                if plus
                else self._made.setdefault((weight.dtype, dtype), ([], []))
            )
            copies.append(copy)
            originals.append(weight)
        return joined

    @torch.no_grad()
    def fill(self) -> None:
        """Write the weights as they are now; graphs of what was there before can't be gone back
        through.
        """
        for copies, originals in self._made.values():
            torch._foreach_copy_(copies, originals)
        for plus, (copies, originals) in self._raised.items():
            # Not in place: other threads may read them, and they are what they were.
            raised = [torch.empty_like(one) for one in copies]
            torch._foreach_copy_(raised, originals)
            torch._foreach_add_(raised, plus)
            torch._foreach_copy_(copies, raised)


@functools.cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has its product, which knows no gradient, in a dtype on this processor.

    F.linear sends fp32 to MKL, which is slower on AMD's processors, and lays bf16 weights out anew
    in every call.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def is_gelu(activation: object) -> bool:
    """Whether it is the exact GELU, by the error function."""
    exact = type(activation) is nn.GELU and activation.approximate == "none"
    return exact or type(activation) is GELUActivation


def joins_product(activation: Activation | None) -> bool:
    """Whether oneDNN can apply it to a product before that is written."""
    if (
        not isinstance(activation, nn.Module)
        or must_be_called(activation)
        or not is_gelu(activation)
    ):
        return False
    return getattr(activation, "act", F.gelu) is F.gelu


class StepLinear:
    """One or more linear modules that read the same rows, as one product; weights are cast once.

    Args:
        modules: whose outputs lie side by side in the product's.
        dtype: of the product.
        num_tokens: about how many rows it will be given in all.
        activation: is applied to the product.
        gated: it is applied to the first half of the product's columns, and the result multiplied
            with the second.
        copies: makes the narrow copies of many such products together, before the first is asked
            for; None makes these now.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        dtype: torch.dtype,
        num_tokens: int,
        activation: Activation | None = None,
        copies: NarrowCopies | None = None,
        *,
        gated: bool = False,
    ) -> None:
        self.activation, self._gated = activation, gated
        self.modules: Sequence[nn.Module] | None = None
        self._sources: list[tuple[nn.Module, Tensor, torch.dtype]] = []
        self.inference: tuple[Any, ...] | None = None  # what follows x in oneDNN's product
        # And in that with the gate's half of the weight, where both halves are products of oneDNN.
        self._gate: tuple[Any, ...] | None = None
        self.int8: Int8Weight | None = None
        quantized = [
            module
            for module in modules
            if type(module) is Int8Linear and not must_be_called(module)
        ]
        if len(quantized) == len(modules):
            self.int8 = Int8Linear.joined(quantized).weight
            return
        if not all(type(module) is nn.Linear and not must_be_called(module) for module in modules):
            self.modules = modules  # an adapter's, or hooked: it must be called
            return
        self.weights: list[Tensor] = [module.weight for module in modules]  # type: ignore[misc]
        biases: list[Any] = [module.bias for module in modules]
        self.biases: list[Tensor] = [] if biases[0] is None else biases
        self._sources = [
            (module, weight, weight.dtype)
            for module, weight in zip(modules, self.weights, strict=True)
        ]
        self._sizes = [one.shape[0] for one in self.weights]
        self.narrow: tuple[Tensor, Tensor | None] | None = None
        if len(self.weights) > 1 or self.weights[0].dtype != dtype:
            own = NarrowCopies() if copies is None else copies
            self.narrow = (
                own.joined(self.weights, dtype),
                own.joined(self.biases, dtype) if self.biases else None,
            )
            if copies is None:
                own.fill()
        on_cpu = self.weights[0].device.type == "cpu"
        if on_cpu and not torch.is_grad_enabled() and _onednn_multiplies(dtype):
            fused = joins_product(activation)
            halves = 2 if gated and fused else 1
            weight, bias = self.ready
            weights: Sequence[Tensor] = weight.chunk(halves)
            biases_of = [None] * halves if bias is None else bias.chunk(halves)
            if num_tokens > MAX_TOKENS:  # worth the new layout
                reorder = torch.ops.mkldnn._reorder_linear_weight
                weights = [reorder(one, MAX_TOKENS) for one in weights]
            then: tuple[Any, ...] = ("gelu", [], "none") if fused else ("none", [], "")
            first: tuple[Any, ...] = (weights[0], biases_of[0], *then)
            if halves == 1:
                self.inference = first
            else:
                self._gate, self.inference = first, (weights[1], biases_of[1], "mul")
            if fused:
                self.activation, self._gated = None, False

    @property
    def ready(self) -> tuple[Tensor, Tensor | None]:
        """The product's weight and bias, as copies where they are not a module's own."""
        return self.narrow or (self.weights[0], self.biases[0] if self.biases else None)

    def is_current(self) -> bool:
        """Whether the weights are still its modules'."""
        for module, weight, dtype in self._sources:  # a step asks every layer
            if module._parameters.get("weight") is not weight or weight.dtype != dtype:
                return False
        return True

    def weight_gradients(self, grad: Tensor, x: Tensor) -> Sequence[Tensor | None]:
        """Of each weight, from the product's gradient and its rows."""
        weights = self.weights
        for weight in weights:
            if weight.requires_grad:
                return split_rows(product_weight_gradient(grad, x, weights[0].dtype), self._sizes)
        return [None] * len(weights)

    def bias_gradients(self, grad: Tensor) -> Sequence[Tensor | None]:
        """Of each bias, from the product's gradient."""
        if not any(bias.requires_grad for bias in self.biases):
            return [None] * len(self.biases)
        return split_rows(bias_gradient(grad, self.biases[0].dtype), self._sizes)

    @property
    def has_weight(self) -> bool:
        """Whether it multiplies by a weight of its own making, rather than calling modules or
        int8's product.
        """
        return self.modules is None and self.int8 is None

    def __call__(self, x: Tensor | Int8Rows) -> Tensor:
        product = self.product(x)
        if self.activation is None:
            return product
        if not self._gated:
            return self.activation(product)
        gate, up = product.chunk(2, dim=1)
        return self.activation(gate) * up

    def before(self, following: StepLinear, x: Tensor | Int8Rows) -> Tensor | Int8Rows:
        """What the following layer reads: rows of int8 where both are int8 and a GELU is between
        them.
        """
        if self.int8 is not None and following.int8 is not None and joins_product(self.activation):
            return int8_gelu(x, self.int8)
        return self(x)

    def product(self, x: Tensor | Int8Rows) -> Tensor:
        """The product, with the activation only where oneDNN applied it: activation is then
        None.
        """
        if self.int8 is not None:
            return int8_linear(x, self.int8)
        if isinstance(x, Int8Rows):
            x = x.dequantize()
        if self.modules is not None:
            own = (weight.dtype for module in self.modules for weight in module.parameters())
            # Rows wider than the weights are multiplied as the modules themselves would.
            dtype = x.dtype if x.dtype != torch.float32 else next(own, x.dtype)
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                outputs = [module(x).to(x.dtype) for module in self.modules]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if self.inference is not None and self._gate is not None:
            gate = torch.ops.mkldnn._linear_pointwise(x, *self._gate)
            return torch.ops.mkldnn._linear_pointwise.binary(x, gate, *self.inference)
        if self.inference is not None:
            return torch.ops.mkldnn._linear_pointwise(x, *self.inference)
        if self.narrow is not None and torch.is_grad_enabled():
            return _NarrowLinear.apply(x, *self.narrow, *self.weights, *self.biases)
        weight, bias = self.ready
        if (
            bias is not None
            and not torch.is_grad_enabled()  # of which this product knows nothing
            and x.is_cpu
            and x.dtype == torch.bfloat16
            and _onednn_multiplies(x.dtype)
        ):
            # F.linear would write the bias into every row, and oneDNN then add the product to it.
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return F.linear(x, weight, bias)
