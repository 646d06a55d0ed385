"""varlen_attention with relative positions through the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops.cpu import address, compiled
from rerank_fast.ops.cpu.attention import attention_shape, refuse_ends, rows_of
from rerank_fast.ops.relative_positions import RelativePositions

# A part's gradients of the tables are kept until all are added up: as many parts as keep some
# threads busy where there are few heads, and no more.
_MOST_PARTS, _SEQUENCES_PER_PART = 8, 8


def _terms(relative: RelativePositions, num_parts: int) -> Any:
    return compiled().RelativeTerms(
        slots=relative.slots.data_ptr(),
        reach=relative.reach,
        num_slots=relative.num_slots,
        query_positions=address(relative.query_positions),
        keys=rows_of(relative.keys),
        queries=rows_of(relative.queries),
        bias=address(relative.bias),
        num_parts=num_parts,
    )


def _num_parts(cu_seqlens: Tensor) -> int:
    """By the sequences alone: what is added up does not depend on the number of threads."""
    return min(_MOST_PARTS, 1 + (cu_seqlens.shape[0] - 1) // _SEQUENCES_PER_PART)


def _refuse(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, relative: RelativePositions
) -> None:
    """Says what the kernel refused, and why."""
    refuse_ends(q, k, cu_seqlens_q, cu_seqlens_k)
    relative.check_slots()


def relative_attention_forward(
    q: Tensor,  # (Tq, heads, head_size)
    k: Tensor,  # (Tk, heads, head_size)
    v: Tensor,  # (Tk, heads, head_size)
    cu_seqlens_q: Tensor,  # (N + 1,) int32
    cu_seqlens_k: Tensor,  # (N + 1,) int32
    rows: Tensor | None,  # (Tq,) int32
    *options_and_relative: Any,
) -> tuple[Tensor, Tensor]:
    """The backend contract: out (Tq, heads, head_size), and lse (heads, Tq) fp32 for backward."""
    *options, relative = options_and_relative
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    shape = attention_shape(q, k, cu_seqlens_q, cu_seqlens_k, rows, tuple(options))
    terms = _terms(relative, _num_parts(cu_seqlens_q))
    tensors = (rows_of(one) for one in (q, k, v, out))
    if not compiled().relative_forward(shape, terms, *tensors, lse.data_ptr()):
        _refuse(q, k, cu_seqlens_q, cu_seqlens_k, relative)
    return out, lse


def relative_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    *options_and_relative: Any,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """The backend contract: the gradients of q, k, v, written to `into` where it is given, and of
    the keys, queries and bias of the relative positions, None for what they have not.
    """
    *options, relative = options_and_relative
    dq, dk, dv = into or tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (q, k, v)
    )
    shape = attention_shape(q, k, cu_seqlens_q, cu_seqlens_k, rows, tuple(options))
    parts = _num_parts(cu_seqlens_q)
    tables = (relative.keys, relative.queries, relative.bias)
    sums = [
        None
        if one is None
        else torch.empty(parts, one.shape[1], one.shape[0], *one.shape[2:], dtype=torch.float32)
        for one in tables
    ]
    forward = (*(rows_of(one) for one in (q, k, v, out)), lse.data_ptr())
    grads = (rows_of(one) for one in (grad_out, dq, dk, dv))
    addresses = (address(one) for one in sums)
    terms = _terms(relative, parts)
    if not compiled().relative_backward(shape, terms, *forward, *grads, *addresses):
        _refuse(q, k, cu_seqlens_q, cu_seqlens_k, relative)
    d_tables = [
        None if total is None else total.sum(0).transpose(0, 1).to(own.dtype).contiguous()
        for total, own in zip(sums, tables, strict=True)
    ]
    return dq, dk, dv, *d_tables
