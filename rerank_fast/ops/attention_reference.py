"""The specification of varlen_attention and of dropout by place: eager, one sequence at a time, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32 bits, held in int64: three xor-shifts between two multiplications."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def dropout_factors(seed: int, stream: int, rows: Tensor, num_columns: int, p: float) -> Tensor:
    """(R, num_columns) fp64 factors, 0 or 1 / (1 - p), of the (R,) rows of one stream.

    They follow from seed, stream, row and column alone, by a hash of 32 bits: every backend draws the same.
    """
    low, high = (torch.tensor(part, dtype=torch.int64, device=rows.device) for part in (seed, seed >> 32))
    start = _mix((low & 0xFFFFFFFF) ^ _mix(high & 0xFFFFFFFF))
    row = _mix((_mix((start + stream * 0x9E3779B9) & 0xFFFFFFFF) + rows) & 0xFFFFFFFF)
    column = (torch.arange(num_columns, device=rows.device) * 0x9E3779B9) & 0xFFFFFFFF
    drawn = _mix((column[None, :] + row[:, None]) & 0xFFFFFFFF)
    threshold = int(min(p * 2**32, 2**32 - 1))
    return (drawn >= threshold).double() / (1 - p)


def attention(
    q: Tensor,  # (Tq, heads, head_size)
    k: Tensor,  # (Tk, kv_heads, head_size)
    v: Tensor,  # (Tk, kv_heads, head_size)
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Attention as written, differentiable: out (Tq, heads, head_size) and lse (heads, Tq) to base 2."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    outs, sums = [q[:0].to(wide)], [q.new_zeros(q.shape[1], 0, dtype=wide)]
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(ends_q) - 1):
        queries = q[ends_q[n] : ends_q[n + 1]].to(wide).transpose(0, 1)
        keys, values = (
            x[ends_k[n] : ends_k[n + 1]].to(wide).transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v)
        )
        num_q, num_k = queries.shape[1], keys.shape[1]
        place = torch.arange(num_q, device=q.device)[:, None] + num_k - num_q
        key = torch.arange(num_k, device=q.device)[None, :]
        allowed = torch.ones(num_q, num_k, dtype=torch.bool, device=q.device)
        if window_left >= 0:
            allowed &= key >= place - window_left
        if window_right >= 0:
            allowed &= key <= place + window_right
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(~allowed, -torch.inf)
        # A query that may read nothing gives 0, not NaN.
        probabilities = torch.where(allowed.any(dim=1)[:, None], scores, 0.0).softmax(dim=-1) * allowed
        if dropout_p > 0:
            rows = torch.arange(ends_q[n], ends_q[n + 1], device=q.device)
            factors = [dropout_factors(seed, head, rows, num_k, dropout_p) for head in range(q.shape[1])]
            probabilities = probabilities * torch.stack(factors).to(wide)
        outs.append((probabilities @ values).transpose(0, 1))
        sums.append(scores.logsumexp(dim=-1) / torch.tensor(2.0).log().item())
    return torch.cat(outs).to(q.dtype), torch.cat(sums, dim=1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *options: float
) -> tuple[Tensor, Tensor]:
    """The backend contract: out and lse."""
    out, lse = attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)  # type: ignore[arg-type]
    return out.contiguous(), lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *options: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of q, k and v, by autograd of the specification."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        again, _ = attention(*leaves, cu_seqlens_q, cu_seqlens_k, *options)  # type: ignore[arg-type, call-arg]
        dq, dk, dv = torch.autograd.grad(again, leaves, grad_out, allow_unused=True, materialize_grads=True)
    return dq, dk, dv
