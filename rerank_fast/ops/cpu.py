"""The CPU backend: hands tensors' addresses to the compiled kernels in csrc/."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

try:
    import rerank_fast._C as _compiled
except ImportError as error:
    _C: Any = None
    _reason = str(error)
else:
    _C, _reason = _compiled, ""

# The enums of csrc/lambda_loss.h.
_SCHEMES = {"none": 0, "ndcg1": 1, "ndcg2": 2, "lambdarank": 3, "ndcg2pp": 4}
_REDUCTIONS = {"pairs": 0, "lists": 1, "sum": 2, "none": 3}
_SCALES = {"binary": 1 / math.log(2), "natural": 1.0}


def available() -> bool:
    """Whether the compiled module is there."""
    return _C is not None


def unavailable_reason() -> str:
    """What is missing and how to get it."""
    return (
        f"the compiled module rerank_fast._C is missing ({_reason}). Install a C++17 compiler "
        "(Debian and Ubuntu: apt-get install g++) and run: pip install --force-reinstall --no-deps -e ."
    )


def forward(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
    *,
    scheme: str,
    k: int,
    sigma: float,
    mu: float,
    eps: float,
    reduction_log: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The backend contract: the loss, () or (Q,), and dL/dscores (N,), in fp32 or, for fp64 scores, fp64."""
    if scores.dtype == torch.float64:
        kernel = _C.lambda_loss_double
    else:
        scores, kernel = scores.float(), _C.lambda_loss_float
    num_lists = offsets.shape[0] - 1
    loss = scores.new_empty((num_lists,) if reduction == "none" else ())
    grad = torch.empty_like(scores)
    kernel(
        scores.data_ptr(),
        labels.data_ptr(),
        offsets.data_ptr(),
        num_lists,
        _SCHEMES[scheme],
        k,
        sigma,
        mu,
        eps,
        _SCALES[reduction_log],
        _REDUCTIONS[reduction],
        torch.get_num_threads(),
        loss.data_ptr(),
        grad.data_ptr(),
    )
    return loss, grad


def _rows(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _attention_shape(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: tuple[Any, ...]
) -> tuple[Any, ...]:
    scale, window_left, window_right, dropout_p, seed = options
    sizes = (cu_seqlens_q.shape[0] - 1, q.shape[1], k.shape[1], q.shape[2])
    ends = (cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr())
    bf16 = q.dtype == torch.bfloat16
    return *sizes, *ends, bf16, scale, window_left, window_right, dropout_p, seed, torch.get_num_threads()


def varlen_attention_forward(
    q: Tensor,  # (Tq, heads, head_size)
    k: Tensor,  # (Tk, kv_heads, head_size)
    v: Tensor,  # (Tk, kv_heads, head_size)
    cu_seqlens_q: Tensor,  # (N + 1,) int32
    cu_seqlens_k: Tensor,  # (N + 1,) int32
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The backend contract: out (Tq, heads, head_size), and lse (heads, Tq) fp32 for backward."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    shape = _attention_shape(q, k, cu_seqlens_q, cu_seqlens_k, options)
    _C.varlen_attention_forward(shape, _rows(q), _rows(k), _rows(v), _rows(out), lse.data_ptr())
    return out, lse


def varlen_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of q, k and v."""
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (q, k, v))
    shape = _attention_shape(q, k, cu_seqlens_q, cu_seqlens_k, options)
    forward = (_rows(q), _rows(k), _rows(v), _rows(out), lse.data_ptr())
    _C.varlen_attention_backward(shape, *forward, _rows(grad_out), _rows(dq), _rows(dk), _rows(dv))
    return dq, dk, dv


def _norm_shape(x: Tensor, eps: float, dropout_p: float, seed: int) -> tuple[Any, ...]:
    return *x.shape, x.dtype == torch.bfloat16, eps, dropout_p, seed, torch.get_num_threads()


def residual_norm_forward(
    x: Tensor,  # (T, H) bf16 or fp32
    residual: Tensor,  # (T, H) fp32
    weight: Tensor,  # (H,) fp32
    bias: Tensor,  # (H,) fp32
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend contract: y (T, H) fp32, y in x's dtype, mean (T,) and rstd (T,) fp32 for backward."""
    y = torch.empty_like(residual)
    narrow = torch.empty_like(x) if x.dtype == torch.bfloat16 else y.new_empty(0)
    mean, rstd = residual.new_empty(x.shape[0]), residual.new_empty(x.shape[0])
    tensors = (x, residual, weight, bias, y, narrow, mean, rstd)
    _C.residual_norm_forward(_norm_shape(x, eps, dropout_p, seed), *(tensor.data_ptr() for tensor in tensors))
    return y, narrow, mean, rstd


def residual_norm_backward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_y: Tensor | None,
    grad_narrow: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of x, residual, weight and bias."""
    grads = (torch.empty_like(x), torch.empty_like(residual), torch.empty_like(weight), torch.empty_like(weight))
    incoming = [0 if grad is None else grad.data_ptr() for grad in (grad_y, grad_narrow)]
    forward = (tensor.data_ptr() for tensor in (x, residual, weight, mean, rstd))
    outgoing = (tensor.data_ptr() for tensor in grads)
    _C.residual_norm_backward(_norm_shape(x, eps, dropout_p, seed), *forward, *incoming, *outgoing)
    return grads


def _int8_rows_shape(x: Tensor) -> tuple[Any, ...]:
    return *x.shape, x.dtype == torch.bfloat16, torch.get_num_threads()


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The backend contract: x (T, K), bf16 or fp32, as uint8 around levels + 1, and a scale (T,) fp32 a row."""
    quantized, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape[0], dtype=torch.float32)
    _C.quantize_rows(_int8_rows_shape(x), x.data_ptr(), levels, quantized.data_ptr(), scale.data_ptr())
    return quantized, scale


def scale_rows_(x: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The backend contract: x (T, N) becomes x * row_scale (T,) + bias (N,), in place; both fp32."""
    address = 0 if bias is None else bias.data_ptr()
    _C.scale_rows(_int8_rows_shape(x), x.data_ptr(), row_scale.data_ptr(), address)
    return x
