"""Linear layers with int8 weights and activations, and what follows them, fused. Inference only.

quantize_weight() once; then int8_linear() on rows, int8_gelu() where the next layer takes int8 too,
and int8_norm() where a residual and a LayerNorm come first. Weights have a scale for each output,
activations one for each row (a token), found when it is there: a row's result does not depend on
the others. The product is oneDNN's. There is no schema: neither a gradient nor torch.compile passes
through here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rerank_fast.ops import cpu
from rerank_fast.ops.cpu import int8_rows
from rerank_fast.ops.options import check_positive
from rerank_fast.ops.registry import Backends, Served

Backend = Literal["reference", "cpu"]
_WIDE = torch.float32


@dataclass(frozen=True)
class Int8Weight:
    """weight[n] = values[n] * scale[n]; packed is its layout for the product."""

    values: Tensor  # (N, K) int8
    scale: Tensor  # (N,) fp32
    bias: Tensor | None  # (N,) fp32
    packed: Any = field(repr=False)  # None where only the reference runs
    added: Tensor = field(repr=False)  # (N,) fp32: the bias, or zeros


@dataclass(frozen=True)
class Int8Rows:
    """Rows of activations: (values - levels - 1) * scale, as activation_levels() has it."""

    values: Tensor  # (T, K) uint8
    scale: Tensor  # (T,) fp32
    dtype: torch.dtype  # that products of them come in

    def __getitem__(self, index: Tensor) -> Int8Rows:
        """The rows at the (M,) index."""
        return Int8Rows(self.values[index], self.scale[index], self.dtype)

    def dequantize(self) -> Tensor:
        """(T, K) in the rows' dtype."""
        return (_centred(self) * self.scale[:, None]).to(self.dtype)


def quantize_weight(weight: Tensor, bias: Tensor | None) -> Int8Weight:
    """A (N, K) weight and (N,) bias as int8 with one scale for each of the N outputs."""
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(
            f"weight must be a floating-point tensor of shape (N, K), N and K at least 1, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have the shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    weight = weight.detach().float().contiguous()  # as oneDNN reads it
    scale = weight.abs().amax(dim=1) / 127
    values = (
        (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    )
    return _pack(values, scale, None if bias is None else bias.detach().float().contiguous())


def join(weights: list[Int8Weight]) -> Int8Weight:
    """Several layers of one input as one layer, their outputs side by side."""
    biases = [weight.bias for weight in weights if weight.bias is not None]
    if biases and len(biases) != len(weights):
        raise ValueError(
            f"expected a bias for all or none of {len(weights)} weights, got {len(biases)}"
        )
    return _pack(
        torch.cat([weight.values for weight in weights]),
        torch.cat([weight.scale for weight in weights]),
        torch.cat(biases) if biases else None,
    )


def _pack(values: Tensor, scale: Tensor, bias: Tensor | None) -> Int8Weight:
    packed = torch.ops.onednn.qlinear_prepack(values, None) if onednn_available() else None
    return Int8Weight(
        values, scale, bias, packed, torch.zeros_like(scale) if bias is None else bias
    )


@lru_cache
def onednn_available() -> bool:
    """Whether oneDNN's int8 product can run: x86 processors and a torch built with it."""
    has_product = hasattr(torch.ops.onednn, "qlinear_pointwise") and hasattr(
        torch.ops.onednn, "qlinear_prepack"
    )
    return torch.backends.mkldnn.is_available() and has_product and torch.cpu._is_avx2_supported()


@lru_cache
def activation_levels() -> int:
    """127, or 63 where the product sums two terms in 16 bits, as without VNNI: above, they
    overflow.

    The product itself is asked, by the largest values there are.
    """
    if not onednn_available():
        return 127
    width = 64
    values = torch.full((1, width), 255, dtype=torch.uint8)
    weight = _pack(torch.full((width, width), 127, dtype=torch.int8), torch.ones(width), None)
    product = _onednn_product(values, 0, weight, torch.float32)
    return 127 if bool((product == 255 * 127 * width).all()) else 63


def quantize_rows(x: Tensor) -> Int8Rows:
    """(T, K) fp32 or bf16 as rows of int8; one that holds NaN or an infinity has the scale NaN."""
    levels = activation_levels()
    if x.device.type == "cpu" and cpu.available():
        return Int8Rows(*int8_rows.quantize_rows(x.contiguous(), levels), x.dtype)
    scale = x.float().abs().amax(dim=1) / levels
    scale = scale.masked_fill(~scale.isfinite(), torch.nan)
    rounded = (
        (x.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None] + 0.5)
        .floor()
        .nan_to_num(0)
    )
    return Int8Rows((rounded + (levels + 1)).to(torch.uint8), scale, x.dtype)


def _centred(rows: Int8Rows) -> Tensor:
    return rows.values.float() - (activation_levels() + 1)


def _reference(rows: Int8Rows, weight: Int8Weight) -> Tensor:
    """The specification, in fp32: the product of the rounded numbers."""
    return (
        F.linear(_centred(rows), weight.values.float()) * weight.scale * rows.scale[:, None]
        + weight.added
    )


def _product(rows: Int8Rows, weight: Int8Weight) -> Tensor:
    """What lacks the rows' scales and the bias."""
    return _onednn_product(rows.values, activation_levels() + 1, weight, rows.dtype)


def _onednn_product(values: Tensor, zero: int, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """(values - zero) @ weight.T in a dtype."""
    zeros = torch.zeros(len(weight.scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        values, 1.0, zero, weight.packed, weight.scale, zeros, None, 1.0, 0, dtype, "none", [], ""
    )


def _reference_linear(rows: Int8Rows, weight: Int8Weight) -> Tensor:
    return _reference(rows, weight).to(rows.dtype)


def _reference_gelu(rows: Int8Rows, weight: Int8Weight) -> Int8Rows:
    return replace(quantize_rows(F.gelu(_reference(rows, weight))), dtype=rows.dtype)


def _reference_norm(
    rows: Int8Rows, weight: Int8Weight, residual: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Int8Rows]:
    total = residual + _reference(rows, weight)
    y = F.layer_norm(total, residual.shape[1:], scale, shift, eps)
    return y, replace(quantize_rows(y), dtype=rows.dtype)


def _fused_linear(rows: Int8Rows, weight: Int8Weight) -> Tensor:
    return int8_rows.scale_rows_(_product(rows, weight), rows.scale, weight.added)


def _fused_gelu(rows: Int8Rows, weight: Int8Weight) -> Int8Rows:
    product = _product(rows, weight)
    values = int8_rows.gelu_rows(product, rows.scale, weight.added, activation_levels())
    return Int8Rows(*values, rows.dtype)


def _fused_norm(
    rows: Int8Rows, weight: Int8Weight, residual: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Int8Rows]:
    product = _product(rows, weight), rows.scale, weight.added
    residual, scale, shift = residual.contiguous(), scale.contiguous(), shift.contiguous()
    y, values, row_scale = int8_rows.norm_rows(
        *product, residual, scale, shift, eps, activation_levels()
    )
    return y, Int8Rows(values, row_scale, rows.dtype)


def _refusal(values: Tensor, weight: Int8Weight) -> str:
    return "" if weight.packed is not None else "can't run: oneDNN's int8 product is not there"


_BACKENDS = Backends(
    "int8_linear",
    reference=Served(lambda: (_reference_linear, _reference_gelu, _reference_norm)),
    cpu=Served(lambda: (_fused_linear, _fused_gelu, _fused_norm), _refusal),
)


def _prepare(
    x: Tensor | Int8Rows, weight: Int8Weight, backend: str | None
) -> tuple[Int8Rows, tuple[Callable[..., Any], ...]]:
    """The rows, quantised if they are not yet, and what runs."""
    values = x.values if isinstance(x, Int8Rows) else x
    if (
        values.dim() != 2
        or values.shape[1] != weight.values.shape[1]
        or x.dtype not in (_WIDE, torch.bfloat16)
    ):
        width = weight.values.shape[1]
        raise ValueError(
            f"x must be fp32 or bf16 of shape (T, {width}), got {x.dtype} {tuple(values.shape)}"
        )
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "int8 weights are for inference: expected an x without a gradient; train in fp32 or "
            "bf16"
        )
    functions = _BACKENDS[_BACKENDS.resolve(backend, values, weight)]
    return x if isinstance(x, Int8Rows) else quantize_rows(x), functions


def int8_linear(
    x: Tensor | Int8Rows, weight: Int8Weight, *, backend: Backend | None = None
) -> Tensor:
    """x @ weight.T + bias in int8.

    Args:
        x: (T, K) fp32 or bf16 on the CPU, without a gradient, or such rows in int8.
        weight: (N, K), from quantize_weight.
        backend: "cpu" (oneDNN's product between C++ passes) or "reference"; None takes the best
            that can run.

    Returns:
        (T, N) in x's dtype. A row of x that holds NaN or an infinity is NaN, and changes no other.

    Raises:
        ValueError: a wrong shape or dtype, a gradient is wanted, or a backend that can't run here.
    """
    rows, (linear, _, _) = _prepare(x, weight, backend)
    return linear(rows, weight)


def int8_gelu(
    x: Tensor | Int8Rows, weight: Int8Weight, *, backend: Backend | None = None
) -> Int8Rows:
    """GELU(x @ weight.T + bias) as rows of int8, in one pass over the product. See int8_linear."""
    rows, (_, gelu, _) = _prepare(x, weight, backend)
    return gelu(rows, weight)


def int8_norm(
    x: Tensor | Int8Rows,
    weight: Int8Weight,
    residual: Tensor,  # (T, N) fp32
    norm_weight: Tensor,  # (N,) fp32
    norm_bias: Tensor,  # (N,) fp32
    *,
    eps: float,
    backend: Backend | None = None,
) -> tuple[Tensor, Int8Rows]:
    """LayerNorm(residual + x @ weight.T + bias) in fp32 and as rows of int8, in one pass over the
    product.

    See int8_linear; ValueError too where the residual or the norm's parameters are of another
    shape, or not fp32, or eps is not above 0.
    """
    eps = check_positive("eps", eps)
    width = weight.values.shape[0]
    shapes = {"residual": (len(residual), width), "norm_weight": (width,), "norm_bias": (width,)}
    for (name, shape), tensor in zip(
        shapes.items(), (residual, norm_weight, norm_bias), strict=True
    ):
        if tensor.shape != shape or tensor.dtype != _WIDE:
            raise ValueError(
                f"{name} must be fp32 of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    rows, (_, _, norm) = _prepare(x, weight, backend)
    if len(rows.scale) != len(residual):
        raise ValueError(
            f"expected as many rows in x as in residual, got {len(rows.scale)} and {len(residual)}"
        )
    return norm(rows, weight, residual, norm_weight, norm_bias, eps)
