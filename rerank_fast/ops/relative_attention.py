"""varlen_attention with relative positions: schema -> fake -> backends -> autograd.Function.

Called through varlen_attention(relative=...), which checks what comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops.cpu import relative_attention as cpu_relative
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.layout import contiguous, rows_contiguous
from rerank_fast.ops.reference import varlen_attention as reference
from rerank_fast.ops.registry import Backends, Served, declare
from rerank_fast.ops.relative_positions import RelativePositions


def fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Of attention with relative positions and without: out, and lse (heads, tokens)."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def _fake_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    slots: Tensor,
    keys: Tensor | None,
    queries: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    tables = (q.new_empty(0 if one is None else one.shape) for one in (keys, queries))
    d_bias = lse.new_empty(0 if bias is None else bias.shape)
    return (*(one.new_empty(one.shape) for one in (q, k, v)), *tables, d_bias)


def _triton() -> tuple[Callable[..., Any], ...]:
    from rerank_fast.ops.triton import relative_attention, relative_attention_backward

    return relative_attention.forward, relative_attention_backward.backward


# Which one runs is varlen_attention's choice.
_BACKENDS = Backends(
    "relative_attention",
    reference=Served(lambda: (reference.forward, reference.backward)),
    cpu=Served(
        lambda: (
            cpu_relative.relative_attention_forward,
            cpu_relative.relative_attention_backward,
        )
    ),
    triton=Served(_triton),
)


@declare("relative_attention", fake=fake_forward)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    slots: Tensor,
    keys: Tensor | None,
    queries: Tensor | None,
    bias: Tensor | None,
    query_positions: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    forward, _ = _BACKENDS[backend]
    places, relative = _laid_out(
        cu_seqlens_q, cu_seqlens_k, rows, slots, keys, queries, bias, query_positions
    )
    q, k, v = (rows_contiguous(tensor) for tensor in (q, k, v))
    return forward(q, k, v, *places, scale, -1, -1, dropout_p, seed, relative)


@declare("relative_attention_backward", fake=_fake_backward)
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    slots: Tensor,
    keys: Tensor | None,
    queries: Tensor | None,
    bias: Tensor | None,
    query_positions: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A gradient of what is None has no element."""
    _, backward = _BACKENDS[backend]
    places, relative = _laid_out(
        cu_seqlens_q, cu_seqlens_k, rows, slots, keys, queries, bias, query_positions
    )
    q, k, v, grad_out = (rows_contiguous(tensor) for tensor in (q, k, v, grad_out))
    found = backward(q, k, v, out, lse, grad_out, *places, scale, -1, -1, dropout_p, seed, relative)
    return tuple(q.new_empty(0) if one is None else one for one in found)  # type: ignore[return-value]


def _laid_out(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    slots: Tensor,
    keys: Tensor | None,
    queries: Tensor | None,
    bias: Tensor | None,
    query_positions: Tensor | None,
) -> tuple[list[Any], RelativePositions]:
    """As kernels read them: of the tables each row of a head is one run of memory, the rest is."""
    return contiguous(cu_seqlens_q, cu_seqlens_k, rows), RelativePositions(
        slots.contiguous(),
        None if keys is None else rows_contiguous(keys),
        None if queries is None else rows_contiguous(queries),
        None if bias is None else bias.contiguous(),
        None if query_positions is None else query_positions.contiguous(),
    )


def unchecked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    relative: RelativePositions,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse, without a graph; options are scale, dropout_p, seed and backend."""
    return _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, rows, *relative.parts, *options)


def unchecked_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    relative: RelativePositions,
    *options: Any,
    into: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of keys, queries and bias; those of q, k and v are written to `into`, tensors
    of their shapes, each head's row contiguous. Of the backends "cpu" and "reference".
    """
    scale, dropout_p, seed, backend = options
    _, backward = _BACKENDS[backend]
    places, relative = _laid_out(cu_seqlens_q, cu_seqlens_k, rows, *relative.parts)
    q, k, v, grad_out = (rows_contiguous(tensor) for tensor in (q, k, v, grad_out))
    found = backward(
        *(q, k, v, out, lse, grad_out, *places, scale, -1, -1, dropout_p, seed, relative), into=into
    )
    return list(found[3:])


class RelativeAttention(torch.autograd.Function):
    """varlen_attention's result with the parts of a RelativePositions, all None where it has none.

    options are the op's scale, dropout_p, seed and backend.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor
        | None,  # None: as cu_seqlens_q; torch.compile refuses one tensor in two places
        rows: Tensor | None,
        slots: Tensor,
        keys: Tensor | None,
        queries: Tensor | None,
        bias: Tensor | None,
        query_positions: Tensor | None,
        options: tuple[Any, ...],
    ) -> Tensor:
        ends = (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)
        places = (*ends, rows, slots, keys, queries, bias, query_positions)
        out, lse = _forward(q, k, v, *places, *options)
        ctx.save_for_backward(q, k, v, out, lse, *places)
        ctx.options = options
        return out

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *places = ctx.saved_tensors
        dq, dk, dv, *tables = _backward(q, k, v, out, lse, grad_out, *places, *ctx.options)
        tables = [
            None if own is None else grad for own, grad in zip(places[4:7], tables, strict=True)
        ]
        return dq, dk, dv, None, None, None, None, *tables, None, None
