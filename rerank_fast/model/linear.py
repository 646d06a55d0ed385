"""Linear layers of a step: weights cast, joined and laid out once, gradients added up in the weights' own dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from rerank_fast.model.packing import MAX_TOKENS
from rerank_fast.model.precision.int8 import Int8Linear
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.int8_linear import Int8Rows, Int8Weight, int8_gelu, int8_linear

Activation: TypeAlias = Callable[[Tensor], Tensor]


class _NarrowLinear(torch.autograd.Function):
    """A product in bf16 whose weight gradients reach the fp32 weight in fp32.

    The bf16 copy is made once a step and shared by its micro-batches; were it part of the graph, their gradients
    would be added up in bf16.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, narrow_weight: Tensor, narrow_bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, narrow_weight)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, narrow_weight, narrow_bias)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow_weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            grad @ narrow_weight if wants_x else None,
            (grad.t() @ x).to(weight_dtype) if wants_weight else None,
            grad.sum(0).to(bias_dtype) if wants_bias else None,
            None,
            None,
        )


@functools.cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has its product, which knows no gradient, in a dtype on this processor.

    F.linear sends fp32 to MKL, which is slower on AMD's processors, and lays bf16 weights out anew
    in every call.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_gelu(activation: object) -> bool:
    """Whether it is the exact GELU, by the error function."""
    exact = type(activation) is nn.GELU and activation.approximate == "none"
    return exact or type(activation) is GELUActivation


def _joins_product(activation: Activation | None) -> bool:
    """Whether oneDNN can apply it to a product before that is written."""
    if not isinstance(activation, nn.Module) or must_be_called(activation) or not is_gelu(activation):
        return False
    return getattr(activation, "act", F.gelu) is F.gelu


class StepLinear:
    """One or more linear modules that read the same rows, as one product; weights are cast once.

    The activation, if there is one, is applied to the product.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        dtype: torch.dtype,
        num_tokens: int,
        activation: Activation | None = None,
    ) -> None:
        self.activation = activation
        self.modules: Sequence[nn.Module] | None = None
        self.inference: tuple[Any, ...] | None = None  # what follows x in oneDNN's product
        self.int8: Int8Weight | None = None
        quantized = [module for module in modules if type(module) is Int8Linear and not must_be_called(module)]
        if len(quantized) == len(modules):
            self.int8 = Int8Linear.joined(quantized).weight
            return
        if not all(type(module) is nn.Linear and not must_be_called(module) for module in modules):
            self.modules = modules  # an adapter's, or hooked: it must be called
            return
        weights: list[Any] = [module.weight for module in modules]
        biases: list[Any] = [module.bias for module in modules]
        self.weight: Tensor = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias: Tensor | None = None
        if biases[0] is not None:
            self.bias = biases[0] if len(biases) == 1 else torch.cat(biases)
        self.narrow = None
        if self.weight.dtype != dtype:
            self.narrow = (
                self.weight.detach().to(dtype),
                None if self.bias is None else self.bias.detach().to(dtype),
            )
        on_cpu = self.weight.device.type == "cpu"
        if on_cpu and not torch.is_grad_enabled() and _onednn_multiplies(dtype):
            weight, bias = self.narrow or (self.weight, self.bias)
            if num_tokens > MAX_TOKENS:  # worth the new layout
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, MAX_TOKENS)
            self.inference = weight, bias, "none", [], ""
            if _joins_product(activation):
                self.inference, self.activation = (weight, bias, "gelu", [], "none"), None

    @property
    def has_weight(self) -> bool:
        """Whether it multiplies by a weight of its own making, rather than calling modules or int8's product."""
        return self.modules is None and self.int8 is None

    def __call__(self, x: Tensor | Int8Rows) -> Tensor:
        product = self._product(x)
        return product if self.activation is None else self.activation(product)

    def before(self, following: StepLinear, x: Tensor | Int8Rows) -> Tensor | Int8Rows:
        """What the following layer reads: rows of int8 where both are int8 and a GELU is between them."""
        if self.int8 is not None and following.int8 is not None and _joins_product(self.activation):
            return int8_gelu(x, self.int8)
        return self(x)

    def _product(self, x: Tensor | Int8Rows) -> Tensor:
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
        if self.inference is not None:
            return torch.ops.mkldnn._linear_pointwise(x, *self.inference)
        if self.narrow is None:
            return F.linear(x, self.weight, self.bias)
        return _NarrowLinear.apply(x, self.weight, self.bias, *self.narrow)


def must_be_called(module: nn.Module) -> bool:
    """Whether somebody changed what a call does: by hooks, or a forward of its own, as Accelerate puts on one."""
    return has_hooks(module) or "forward" in vars(module)


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
