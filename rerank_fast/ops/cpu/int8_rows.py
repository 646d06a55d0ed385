"""What stands between int8 products, through the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops.cpu import compiled


def _int8_shape(x: Tensor) -> Any:
    threads = torch.get_num_threads()
    return compiled().Int8RowsShape(
        rows=x.shape[0], width=x.shape[1], bf16=x.dtype == torch.bfloat16, num_threads=threads
    )


def _int8_product(x: Tensor, row_scale: Tensor, bias: Tensor) -> Any:
    return compiled().Int8Product(x.data_ptr(), row_scale.data_ptr(), bias.data_ptr())


def _int8_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Any]:
    """Values and scales to be written, and where."""
    values, scale = (
        torch.empty(x.shape, dtype=torch.uint8),
        torch.empty(x.shape[0], dtype=torch.float32),
    )
    return values, scale, compiled().Int8Rows(values.data_ptr(), scale.data_ptr(), levels)


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The backend contract: x (T, K), bf16 or fp32, as uint8 around levels + 1, and a scale (T,)
    fp32 a row.
    """
    values, scale, to = _int8_rows(x, levels)
    compiled().quantize_rows(_int8_shape(x), x.data_ptr(), to)
    return values, scale


def scale_rows_(x: Tensor, row_scale: Tensor, bias: Tensor) -> Tensor:
    """The backend contract: x (T, N) becomes x * row_scale (T,) + bias (N,), in place; both
    fp32.
    """
    compiled().scale_rows(_int8_shape(x), _int8_product(x, row_scale, bias), x.data_ptr())
    return x


def gelu_rows(x: Tensor, row_scale: Tensor, bias: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The backend contract: GELU(x * row_scale + bias) as quantize_rows gives it."""
    values, scale, to = _int8_rows(x, levels)
    compiled().gelu_rows(_int8_shape(x), _int8_product(x, row_scale, bias), to)
    return values, scale


def norm_rows(
    x: Tensor,
    row_scale: Tensor,
    bias: Tensor,
    residual: Tensor,  # (T, N) fp32
    norm_weight: Tensor,  # (N,) fp32
    norm_bias: Tensor,  # (N,) fp32
    eps: float,
    levels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend contract: LayerNorm(residual + x * row_scale + bias) in fp32, and as
    quantize_rows gives it.
    """
    y, (values, scale, to) = torch.empty_like(residual), _int8_rows(x, levels)
    norm = (residual.data_ptr(), norm_weight.data_ptr(), norm_bias.data_ptr(), eps, y.data_ptr())
    compiled().norm_rows(_int8_shape(x), _int8_product(x, row_scale, bias), *norm, to)
    return y, values, scale
