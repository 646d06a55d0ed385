"""LambdaLoss in Triton: ranks and gains, then pairs, then the reduction over lists; three launches.

A program works on one tile of documents of one list (grid: lists x tiles a list could have at most; programs
past a list's end return at once). Tiles of other documents are visited in a loop, so nothing of size D x D is
stored and a list may have any length. Every document's gradient is summed by the one program that owns it:
no atomics, the same bits every time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_SCHEMES = {"none": 0, "ndcg1": 1, "ndcg2": 2, "lambdarank": 3, "ndcg2pp": 4}
# Documents a tile, by columns: one configuration that suits every list.
LAUNCH = {"BLOCK": 32, "num_warps": 4}
_REDUCE = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _inverse_discount(rank, dtype: tl.constexpr):
    """1 / log2(1 + rank)."""
    return 1.0 / tl.log2(1.0 + rank.to(dtype))


@triton.jit
def rank_kernel(
    scores,  # (N,)
    labels,  # (N,) compute dtype
    offsets,  # (Q + 1,) int64
    rank,  # out (N,) int32, 1-based
    gain,  # out (N,) compute dtype: gain over 2^max label, before normalisation
    ideal,  # out (N,) compute dtype: the document's term of the ideal DCG@k, 0 beyond k
    k,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ranks by counting: how many documents of the list go before this one."""
    start = tl.load(offsets + tl.program_id(0))
    size = (tl.load(offsets + tl.program_id(0) + 1) - start).to(tl.int32)
    first_tile = tl.program_id(1)
    num_tiles = tl.cdiv(size, BLOCK)
    for tile in range(first_tile, num_tiles, tl.num_programs(1)):
        i = tile * BLOCK + tl.arange(0, BLOCK)
        in_i = i < size
        s_i = tl.load(scores + start + i, mask=in_i, other=0.0).to(dtype)
        y_i = tl.load(labels + start + i, mask=in_i, other=0.0)
        nan_i = s_i != s_i
        before = tl.zeros([BLOCK], tl.int32)
        ideal_before = tl.zeros([BLOCK], tl.int32)
        largest = tl.zeros([BLOCK], dtype)
        for other in range(0, num_tiles):
            j = other * BLOCK + tl.arange(0, BLOCK)
            in_j = j < size
            s_j = tl.load(scores + start + j, mask=in_j, other=0.0).to(dtype)
            y_j = tl.load(labels + start + j, mask=in_j, other=0.0)
            nan_j = s_j != s_j
            earlier = j[None, :] < i[:, None]
            # NaN goes first; equal scores, and two NaNs, keep the input order.
            equal = (s_j[None, :] == s_i[:, None]) | (nan_j[None, :] & nan_i[:, None])
            above = (s_j[None, :] > s_i[:, None]) | (nan_j[None, :] & (nan_i[:, None] == 0))
            counts = (above | (equal & earlier)) & in_j[None, :]
            before += tl.sum(counts.to(tl.int32), axis=1)
            better = (y_j[None, :] > y_i[:, None]) | ((y_j[None, :] == y_i[:, None]) & earlier)
            ideal_before += tl.sum((better & in_j[None, :]).to(tl.int32), axis=1)
            largest = tl.maximum(largest, tl.max(tl.where(in_j, y_j, 0.0), axis=0))
        # Both gain and normaliser are divided by 2^max label: large labels stay finite.
        relevance = tl.maximum(y_i, 0.0)
        g_i = tl.exp2(relevance - largest) - tl.exp2(-largest)
        counted = (k == 0) | (ideal_before < k)
        term = tl.where(counted, g_i * _inverse_discount(ideal_before + 1, dtype), 0.0)
        tl.store(rank + start + i, before + 1, mask=in_i)
        tl.store(gain + start + i, g_i, mask=in_i)
        tl.store(ideal + start + i, term, mask=in_i)


@triton.jit
def _pair(s_i, s_j, g_i, g_j, r_i, r_j, sigma, mu, SCHEME: tl.constexpr, dtype: tl.constexpr):
    """Weight, -log sigmoid(d) and sigmoid(-d) of pairs (i, j) with d = sigma * (s_i - s_j)."""
    d = sigma * (s_i - s_j)
    t = tl.exp(-tl.abs(d))
    u = 1.0 + t
    # log(1 + t) = log(u) + (rounding of 1 + t) / u: small t keep their relative accuracy.
    negative_log = tl.where(d < 0, -d, 0.0) + tl.log(u) + (t - (u - 1.0)) / u
    probability = tl.where(d >= 0, t, 1.0) / u
    probability = tl.where(d != d, d, probability)
    if SCHEME == 0:
        weight = tl.full(d.shape, 1.0, dtype)
    elif SCHEME == 1:
        weight = g_i * _inverse_discount(r_i, dtype) + 0.0 * g_j
    else:
        difference = tl.abs(g_i - g_j)
        weight = tl.zeros(d.shape, dtype)
        if SCHEME != 2:
            weight = tl.abs(_inverse_discount(r_i, dtype) - _inverse_discount(r_j, dtype)) * difference
        if SCHEME != 3:
            distance = tl.maximum(tl.abs(r_i - r_j), 1)
            delta = _inverse_discount(distance, dtype) - _inverse_discount(distance + 1, dtype)
            delta = tl.where(r_i == r_j, 0.0, delta) * difference
            weight = delta if SCHEME == 2 else mu * delta + weight
    return weight, negative_log, probability


@triton.jit
def pair_kernel(
    scores,  # (N,)
    labels,  # (N,) compute dtype
    offsets,  # (Q + 1,) int64
    rank,  # (N,) int32
    gain,  # (N,) compute dtype
    ideal,  # (N,) compute dtype
    loss,  # out (N,) compute dtype: each document's terms as the preferred one
    pairs,  # out (N,) int32: how many
    grad,  # out (N,) compute dtype: dL/dscore of the list's own sum
    k,
    sigma,
    mu,
    eps,
    scale,
    SCHEME: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each document against all others of its list, once as the better and once as the worse of the two."""
    start = tl.load(offsets + tl.program_id(0))
    size = (tl.load(offsets + tl.program_id(0) + 1) - start).to(tl.int32)
    num_tiles = tl.cdiv(size, BLOCK)
    # Ideal DCG and largest label of the list.
    ideal_sum = tl.zeros([BLOCK], dtype)
    largest = tl.zeros([BLOCK], dtype)
    for other in range(0, num_tiles):
        j = other * BLOCK + tl.arange(0, BLOCK)
        ideal_sum += tl.load(ideal + start + j, mask=j < size, other=0.0)
        largest = tl.maximum(largest, tl.load(labels + start + j, mask=j < size, other=0.0))
    normalizer = tl.maximum(tl.sum(ideal_sum, axis=0), eps * tl.exp2(-tl.max(largest, axis=0)))
    for tile in range(tl.program_id(1), num_tiles, tl.num_programs(1)):
        i = tile * BLOCK + tl.arange(0, BLOCK)
        in_i = i < size
        s_i = tl.load(scores + start + i, mask=in_i, other=0.0).to(dtype)[:, None]
        y_i = tl.load(labels + start + i, mask=in_i, other=0.0)[:, None]
        r_i = tl.load(rank + start + i, mask=in_i, other=1)[:, None]
        g_i = (tl.load(gain + start + i, mask=in_i, other=0.0) / normalizer)[:, None]
        loss_i = tl.zeros([BLOCK], dtype)
        pull_i = tl.zeros([BLOCK], dtype)
        pairs_i = tl.zeros([BLOCK], tl.int32)
        for other in range(0, num_tiles):
            j = other * BLOCK + tl.arange(0, BLOCK)
            in_j = j < size
            s_j = tl.load(scores + start + j, mask=in_j, other=0.0).to(dtype)[None, :]
            y_j = tl.load(labels + start + j, mask=in_j, other=0.0)[None, :]
            r_j = tl.load(rank + start + j, mask=in_j, other=1)[None, :]
            g_j = (tl.load(gain + start + j, mask=in_j, other=0.0) / normalizer)[None, :]
            counts = in_i[:, None] & in_j[None, :]
            if SCHEME == 1:
                better = counts
                worse = counts
            else:
                better = counts & (y_i > y_j)
                worse = counts & (y_i < y_j)
            cut = (k == 0) | (r_i <= k) | (r_j <= k)
            better = better & cut
            worse = worse & cut
            weight, negative_log, probability = _pair(s_i, s_j, g_i, g_j, r_i, r_j, sigma, mu, SCHEME, dtype)
            loss_i += tl.sum(tl.where(better, weight * negative_log, 0.0), axis=1)
            pull_i += tl.sum(tl.where(better, weight * probability, 0.0), axis=1)
            pairs_i += tl.sum(better.to(tl.int32), axis=1)
            back, _, push = _pair(s_j, s_i, g_j, g_i, r_j, r_i, sigma, mu, SCHEME, dtype)
            pull_i -= tl.sum(tl.where(worse, back * push, 0.0), axis=1)
        tl.store(loss + start + i, scale * loss_i, mask=in_i)
        tl.store(pairs + start + i, pairs_i, mask=in_i)
        tl.store(grad + start + i, -scale * sigma * pull_i, mask=in_i)


@triton.jit
def list_sum_kernel(
    loss,  # (N,) compute dtype
    offsets,  # (Q + 1,) int64
    list_loss,  # out (Q,) compute dtype
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each list's sum of its documents' terms."""
    start = tl.load(offsets + tl.program_id(0))
    size = (tl.load(offsets + tl.program_id(0) + 1) - start).to(tl.int32)
    total = tl.zeros([BLOCK], dtype)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(loss + start + i, mask=i < size, other=0.0)
    tl.store(list_loss + tl.program_id(0), tl.sum(total, axis=0))


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
    """The backend contract: the loss, () or (Q,), and dL/dscores (N,), in fp32 or, for fp64 scores, fp64.

    Nothing is read on the host: the grid follows from the shapes alone.
    """
    compute_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    dtype: Any = tl.float64 if compute_dtype == torch.float64 else tl.float32
    n, num_lists = scores.shape[0], offsets.shape[0] - 1
    loss, gain, ideal, grad = (torch.empty(n, dtype=compute_dtype, device=scores.device) for _ in range(4))
    rank, pairs = (torch.empty(n, dtype=torch.int32, device=scores.device) for _ in range(2))
    scale = 1 / math.log(2) if reduction_log == "binary" else 1.0
    if n > 0 and num_lists > 0:
        # Tiles of a list of twice the mean length; longer lists take several tiles a program.
        tiles = min(max(triton.cdiv(2 * n, LAUNCH["BLOCK"] * num_lists), 1), 1024)
        grid = (num_lists, tiles)
        rank_kernel[grid](scores, labels, offsets, rank, gain, ideal, k, dtype=dtype, **LAUNCH)
        pair_kernel[grid](
            scores,
            labels,
            offsets,
            rank,
            gain,
            ideal,
            loss,
            pairs,
            grad,
            k,
            sigma,
            mu,
            eps,
            scale,
            SCHEME=_SCHEMES[scheme],
            dtype=dtype,
            **LAUNCH,
        )
    if reduction == "none":
        list_loss = torch.zeros(num_lists, dtype=compute_dtype, device=scores.device)
        if n > 0 and num_lists > 0:
            list_sum_kernel[(num_lists,)](loss, offsets, list_loss, dtype=dtype, **_REDUCE)
        return list_loss, grad
    if reduction == "sum":
        return loss.sum(), grad
    divisor = pairs.sum().clamp(min=1) if reduction == "pairs" else max(num_lists, 1)
    return loss.sum() / divisor, grad / divisor
