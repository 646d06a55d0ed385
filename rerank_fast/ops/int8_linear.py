"""A linear layer with int8 weights and activations: quantize_weight() once, int8_linear() on rows. Inference only.

Weights have a scale for each output, activations one for each row (a token), found when it is there: a row's result
does not depend on the others. The product is oneDNN's. There is no schema: neither a gradient nor torch.compile
passes through here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rerank_fast.ops import backends, cpu

Backend = Literal["reference", "cpu"]
_BACKENDS = get_args(Backend)


@dataclass(frozen=True)
class Int8Weight:
    """weight[n] = values[n] * scale[n]; packed is its layout for the product."""

    values: Tensor  # (N, K) int8
    scale: Tensor  # (N,) fp32
    bias: Tensor | None  # (N,) fp32
    packed: Any = field(repr=False)  # None where only the reference runs


def quantize_weight(weight: Tensor, bias: Tensor | None) -> Int8Weight:
    """A (N, K) weight and (N,) bias as int8 with one scale for each of the N outputs."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1) / 127
    values = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    return _pack(values, scale, None if bias is None else bias.detach().float().contiguous())


def join(weights: list[Int8Weight]) -> Int8Weight:
    """Several with the same inputs as one, their outputs side by side."""
    biases = [weight.bias for weight in weights if weight.bias is not None]
    if biases and len(biases) != len(weights):
        raise ValueError(f"expected a bias for all or none of {len(weights)} weights, got {len(biases)}")
    return _pack(
        torch.cat([weight.values for weight in weights]),
        torch.cat([weight.scale for weight in weights]),
        torch.cat(biases) if biases else None,
    )


def _pack(values: Tensor, scale: Tensor, bias: Tensor | None) -> Int8Weight:
    packed = torch.ops.onednn.qlinear_prepack(values, None) if onednn_available() else None
    return Int8Weight(values, scale, bias, packed)


@lru_cache
def onednn_available() -> bool:
    """Whether oneDNN's int8 product can run: x86 processors and a torch built with it."""
    has_product = hasattr(torch.ops.onednn, "qlinear_pointwise") and hasattr(torch.ops.onednn, "qlinear_prepack")
    return torch.backends.mkldnn.is_available() and has_product and torch.cpu._is_avx2_supported()


@lru_cache
def activation_levels() -> int:
    """127, or 63 on processors without VNNI, whose 16-bit sums of two products would overflow above."""
    return 127 if getattr(torch.cpu, "_is_vnni_supported", lambda: False)() else 63


def _reference(x: Tensor, weight: Int8Weight, levels: int) -> Tensor:
    """The specification: rows rounded to their levels, then the product of the rounded numbers."""
    scale = x.float().abs().amax(dim=1, keepdim=True) / levels
    rounded = (x.float() / scale.clamp(min=torch.finfo(torch.float32).tiny) + 0.5).floor()
    out = F.linear(rounded, weight.values.float()) * weight.scale * scale
    return (out if weight.bias is None else out + weight.bias).to(x.dtype)


def _cpu(x: Tensor, weight: Int8Weight, levels: int) -> Tensor:
    x = x.contiguous()
    quantized, scale = cpu.quantize_rows(x, levels)
    out = torch.ops.onednn.qlinear_pointwise(
        quantized,
        1.0,  # rows have scales of their own, applied below
        levels + 1,
        weight.packed,
        weight.scale,
        torch.zeros(len(weight.scale), dtype=torch.int32),
        None,
        1.0,
        0,
        x.dtype,
        "none",
        [],
        "",
    )
    return cpu.scale_rows_(out, scale, weight.bias)


def int8_linear(x: Tensor, weight: Int8Weight, *, backend: Backend | None = None) -> Tensor:
    """x @ weight.T + bias in int8.

    Args:
        x: (T, K) fp32 or bf16 on the CPU, without a gradient.
        weight: from quantize_weight.
        backend: "cpu" (oneDNN's product between C++ passes) or "reference"; None takes the best that can run.

    Returns:
        (T, N) in x's dtype.

    Raises:
        ValueError: a wrong shape or dtype, a gradient is wanted, or a backend that can't run here.
    """
    if x.dim() != 2 or x.shape[1] != weight.values.shape[1] or x.dtype not in (torch.float32, torch.bfloat16):
        width = weight.values.shape[1]
        raise ValueError(f"x must be fp32 or bf16 of shape (T, {width}), got {x.dtype} {tuple(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("int8 weights are for inference: expected an x without a gradient; train in fp32 or bf16")
    missing = "" if weight.packed is not None else "can't run: oneDNN's int8 product is not there"
    resolved = backends.resolve("int8_linear", backend, x.device, _BACKENDS, lambda name: missing)
    return (_cpu if resolved == "cpu" else _reference)(x, weight, activation_levels())
