"""The specification of varlen_attention: eager, one sequence at a time, any dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.dropout import dropout_factors
from rerank_fast.ops.reference.relative_attention import RelativeGradients, relative_scores
from rerank_fast.ops.relative_positions import RelativePositions


def _allowed(
    num_q: int, num_k: int, window_left: int, window_right: int, device: torch.device
) -> Tensor:
    """(num_q, num_k): which keys a query reads; the last query stands beside the last key."""
    place = torch.arange(num_q, device=device)[:, None] + num_k - num_q
    key = torch.arange(num_k, device=device)[None, :]
    allowed = torch.ones(num_q, num_k, dtype=torch.bool, device=device)
    if window_left >= 0:
        allowed &= key >= place - window_left
    if window_right >= 0:
        allowed &= key <= place + window_right
    return allowed


def _factors(seed: int, rows: Tensor | None, own: slice, like: Tensor, p: float) -> Tensor:
    """(heads, num_q, num_k) dropout of the probabilities of one sequence; a row is a query of all,
    counted flat.
    """
    if p == 0:
        return torch.ones_like(like)
    drawn = torch.arange(own.start, own.stop, device=like.device) if rows is None else rows[own]
    factors = [
        dropout_factors(seed, head, drawn, like.shape[2], p) for head in range(like.shape[0])
    ]
    return torch.stack(factors).to(like.dtype)


def _scores(
    queries: Tensor,
    keys: Tensor,
    own: slice,
    relative: RelativePositions | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """(heads, num_q, num_k) of the (heads, num_q, head_size) queries of one sequence, which are
    those of `own` of all, and its (heads, num_k, head_size) keys.
    """
    scores = queries @ keys.transpose(1, 2) * scale
    if relative is not None:
        scores = scores + relative_scores(queries, keys, relative, own, scale)
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def forward(
    q: Tensor,  # (Tq, heads, head_size)
    k: Tensor,  # (Tk, kv_heads, head_size)
    v: Tensor,  # (Tk, kv_heads, head_size)
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: int,
    relative: RelativePositions | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as written: out (Tq, heads, head_size), and lse (heads, Tq) to base 2."""
    ragged.check_ends("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    ragged.check_ends("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide, device=q.device)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if relative is not None:
        relative.check_slots()
    for n in range(len(ends_q) - 1):
        own, read = slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])
        queries = q[own].to(wide).transpose(0, 1)
        keys, values = (
            x[read].to(wide).transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v)
        )
        allowed = _allowed(queries.shape[1], keys.shape[1], window_left, window_right, q.device)
        scores = _scores(queries, keys, own, relative, scale, softcap)
        scores = scores.masked_fill(~allowed, -torch.inf)
        # A query that may read nothing gives 0, not NaN.
        probabilities = (
            torch.where(allowed.any(dim=1)[:, None], scores, 0.0).softmax(dim=-1) * allowed
        )
        dropped = probabilities * _factors(seed, rows, own, scores, dropout_p)
        out[own] = (dropped @ values).transpose(0, 1).to(q.dtype)
        lse[:, own] = scores.logsumexp(dim=-1) / math.log(2)
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: int,
    relative: RelativePositions | None = None,
    softcap: float | None = None,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k and v as written, into those tensors where they are given; with
    relative positions also those of their keys, queries and bias, None for what they have not.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = into or [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    ]
    tables = None if relative is None else RelativeGradients(relative, wide)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(ends_q) - 1):
        own, read = slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])
        queries, upstream = (x[own].to(wide).transpose(0, 1) for x in (q, grad_out))
        keys, values = (
            x[read].to(wide).transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v)
        )
        allowed = _allowed(queries.shape[1], keys.shape[1], window_left, window_right, q.device)
        capped = _scores(queries, keys, own, relative, scale, softcap)
        scores = capped.masked_fill(~allowed, -torch.inf)
        probabilities = (
            torch.where(allowed.any(dim=1)[:, None], scores, 0.0).softmax(dim=-1) * allowed
        )
        factors = _factors(seed, rows, own, scores, dropout_p)
        d_probabilities = factors * (upstream @ values.transpose(1, 2))
        along = (probabilities * d_probabilities).sum(dim=-1, keepdim=True)
        d_scores = probabilities * (d_probabilities - along)
        if softcap is not None:
            d_scores = d_scores * (1 - (capped / softcap).square())
        d_queries = scale * d_scores @ keys
        d_keys = scale * d_scores.transpose(1, 2) @ queries
        if tables is not None:
            added = tables.add(queries, keys, d_scores, own, scale)
            d_queries, d_keys = d_queries + added[0], d_keys + added[1]
        dq[own] = d_queries.transpose(0, 1).to(q.dtype)
        # Heads that share a key add up.
        for to, gradient in (
            (dk, d_keys),
            (dv, (probabilities * factors).transpose(1, 2) @ upstream),
        ):
            to[read] = gradient.unflatten(0, (-1, group)).sum(dim=1).transpose(0, 1).to(to.dtype)
    return (dq, dk, dv) if tables is None else (dq, dk, dv, *tables.all())
