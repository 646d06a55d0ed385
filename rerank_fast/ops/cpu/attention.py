"""varlen_attention through the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.cpu import address, compiled


def rows_of(tensor: Tensor | None) -> Any:
    """(tokens, heads, head_size) as the kernels take it; None has no data."""
    if tensor is None:
        return compiled().Rows(0, 0, 0)
    return compiled().Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def attention_shape(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    options: tuple[Any, ...],
    softcap: float | None = None,
) -> Any:
    """scale, window_left, window_right, dropout_p and seed are the options."""
    scale, window_left, window_right, dropout_p, seed = options
    return compiled().AttentionShape(
        num_sequences=cu_seqlens_q.shape[0] - 1,
        num_queries=q.shape[0],
        num_keys=k.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_size=q.shape[2],
        cu_seqlens_q=cu_seqlens_q.data_ptr(),
        cu_seqlens_k=cu_seqlens_k.data_ptr(),
        dropout_rows=address(rows),
        bf16=q.dtype == torch.bfloat16,
        scale=scale,
        softcap=softcap or 0.0,
        window_left=window_left,
        window_right=window_right,
        dropout_p=dropout_p,
        seed=seed,
        num_threads=torch.get_num_threads(),
    )


def refuse_ends(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Says which of them the kernel refused, and why."""
    ragged.check_ends("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    ragged.check_ends("cu_seqlens_k", cu_seqlens_k, k.shape[0])


def varlen_attention_forward(
    q: Tensor,  # (Tq, heads, head_size)
    k: Tensor,  # (Tk, kv_heads, head_size)
    v: Tensor,  # (Tk, kv_heads, head_size)
    cu_seqlens_q: Tensor,  # (N + 1,) int32
    cu_seqlens_k: Tensor,  # (N + 1,) int32
    rows: Tensor | None,  # (Tq,) int32
    *options: Any,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The backend contract: out (Tq, heads, head_size), and lse (heads, Tq) fp32 for backward."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    shape = attention_shape(q, k, cu_seqlens_q, cu_seqlens_k, rows, options, softcap)
    if not compiled().attention_forward(
        shape, rows_of(q), rows_of(k), rows_of(v), rows_of(out), lse.data_ptr()
    ):
        refuse_ends(q, k, cu_seqlens_q, cu_seqlens_k)
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
    rows: Tensor | None,
    *options: Any,
    softcap: float | None = None,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of q, k and v, written to `into` where it is given."""
    dq, dk, dv = into or tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (q, k, v)
    )
    shape = attention_shape(q, k, cu_seqlens_q, cu_seqlens_k, rows, options, softcap)
    forward = (rows_of(q), rows_of(k), rows_of(v), rows_of(out), lse.data_ptr())
    if not compiled().attention_backward(
        shape, *forward, rows_of(grad_out), rows_of(dq), rows_of(dk), rows_of(dv)
    ):
        refuse_ends(q, k, cu_seqlens_q, cu_seqlens_k)
    return dq, dk, dv
