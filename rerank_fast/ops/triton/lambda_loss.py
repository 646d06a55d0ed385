"""LambdaLoss in Triton: ranks, pairs, and the mean; three launches forward, whatever the lists.

A program owns a block of consecutive documents, so that many short lists share a program and a long list is spread
over many. It visits the documents of its lists in tiles; nothing of size D x D is stored and a list may have any
length. A tile without a preference pair is left at once. Every document's gradient is summed by the one program
that owns it, and sums are taken in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_SCHEMES = {"none": 0, "ndcg1": 1, "ndcg2": 2, "lambdarank": 3, "ndcg2pp": 4}
# Documents a block, and a tile: one configuration that suits every list. 8 warps are 4 pairs a thread: with 8 pairs
# a thread ptxas spills on sm_80. fp64 takes more than twice the registers.
LAUNCH = {"BLOCK": 32, "num_warps": 8}
LAUNCH_FP64 = {"BLOCK": 16, "num_warps": 8}
FINISH = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _log1p(t, dtype: tl.constexpr):
    """log(1 + t) for t in [0, 1]: in fp32 t times a polynomial in t - 1/2, without the special function unit."""
    if dtype == tl.float64:
        u = 1.0 + t
        # The rounding of 1 + t, put back: small t keep their relative accuracy.
        result = tl.log(u) + (t - (u - 1.0)) / u
    else:
        v = t - 0.5
        p = v * 0.00523269146 - 0.0085744617
        p = p * v + 0.0115864774
        p = p * v - 0.0202282461
        p = p * v + 0.0366338598
        p = p * v - 0.067711447
        p = p * v + 0.132609085
        p = p * v - 0.288526665
        p = p * v + 0.810930219
        result = t * p
    return result


@triton.jit
def _lists_of(offsets, i, in_i, num_lists, num_steps, n):
    """First document of each document's list, and the one after its last; an empty range where in_i is false."""
    low = tl.zeros(i.shape, tl.int64)
    high = low + (num_lists - 1)
    # The last list that begins at or before i: the lists that share its beginning with it are empty.
    for _ in range(num_steps):
        middle = (low + high + 1) // 2
        begins = tl.load(offsets + middle) <= i
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    start = tl.where(in_i, tl.load(offsets + low), n)
    end = tl.where(in_i, tl.load(offsets + low + 1), 0)
    return start, end


@triton.jit(do_not_specialize=["k", "num_lists", "num_steps", "n"])
def rank_kernel(
    scores,  # (N,)
    labels,  # (N,) compute dtype
    offsets,  # (Q + 1,) int64
    rank,  # out (N,) int32, 1-based
    gain,  # out (N,) compute dtype: gain over 2^max label, before normalisation
    unit,  # out (N,) compute dtype: 2^-max label
    ideal,  # out (N,) compute dtype: the document's term of the ideal DCG@k over 2^max label, 0 beyond k
    k,
    num_lists,
    num_steps,
    n,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ranks by counting: how many documents of the list go before this one."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_i = i < n
    start_i, end_i = _lists_of(offsets, i, in_i, num_lists, num_steps, n)
    first = tl.min(start_i, axis=0)
    width = (tl.max(end_i, axis=0) - first).to(tl.int32)
    # From here on documents are counted from `first`: 32 bits suffice.
    from_i = (start_i - first).to(tl.int32)[:, None]
    to_i = (end_i - first).to(tl.int32)[:, None]
    own = (i - first).to(tl.int32)[:, None]
    s_i = tl.load(scores + i, mask=in_i, other=0.0).to(dtype)[:, None]
    y_i = tl.load(labels + i, mask=in_i, other=0.0)
    nan_i = s_i != s_i
    before = tl.zeros([BLOCK], tl.int32)
    ideal_before = tl.zeros([BLOCK], tl.int32)
    largest = tl.zeros([BLOCK], dtype)
    for tile in range(0, width, BLOCK):
        j = tile + tl.arange(0, BLOCK)
        in_j = j < width
        s_j = tl.load(scores + first + j, mask=in_j, other=0.0).to(dtype)[None, :]
        y_j = tl.load(labels + first + j, mask=in_j, other=0.0)[None, :]
        j = j[None, :]
        same_list = (j >= from_i) & (j < to_i)
        nan_j = s_j != s_j
        earlier = j < own
        # NaN goes first; equal scores, and two NaNs, keep the input order.
        equal = (s_j == s_i) | (nan_j & nan_i)
        above = (s_j > s_i) | (nan_j & (nan_i == 0))
        before += tl.sum(((above | (equal & earlier)) & same_list).to(tl.int32), axis=1)
        better = (y_j > y_i[:, None]) | ((y_j == y_i[:, None]) & earlier)
        ideal_before += tl.sum((better & same_list).to(tl.int32), axis=1)
        largest = tl.maximum(largest, tl.max(tl.where(same_list, y_j, 0.0), axis=1))
    # Gain and ideal DCG are both divided by 2^max label: large labels stay finite.
    unit_i = tl.exp2(-largest)
    gain_i = tl.exp2(tl.maximum(y_i, 0.0) - largest) - unit_i
    ideal_i = tl.where((k == 0) | (ideal_before < k), gain_i / tl.log2(2.0 + ideal_before.to(dtype)), 0.0)
    tl.store(rank + i, before + 1, mask=in_i)
    tl.store(gain + i, gain_i, mask=in_i)
    tl.store(unit + i, unit_i, mask=in_i)
    tl.store(ideal + i, ideal_i, mask=in_i)


@triton.jit
def _rank_weight(r_i, r_j, mu, SCHEME: tl.constexpr, dtype: tl.constexpr):
    """What ranks contribute to the weight of a pair: delta(|r_i - r_j|), |1/D(r_i) - 1/D(r_j)|, or both."""
    weight = tl.zeros(r_i.shape, dtype) + tl.zeros(r_j.shape, dtype)
    if SCHEME != 2:
        inverse_i = 1.0 / tl.log2(1.0 + r_i.to(dtype))
        inverse_j = 1.0 / tl.log2(1.0 + r_j.to(dtype))
        weight = tl.abs(inverse_i - inverse_j)
    if SCHEME != 3:
        # 1/D(d) - 1/D(d + 1) = log2(1 + x) / (D(d) D(d + 1)), x = 1 / (1 + d): no cancellation.
        distance = 1.0 + tl.maximum(tl.abs(r_i - r_j), 1).to(dtype)
        log = tl.log2(distance)
        step = _log1p(1.0 / distance, dtype) * 1.4426950408889634
        delta = step / (log * (log + step))
        weight = delta if SCHEME == 2 else mu * delta + weight
    return weight


@triton.jit(do_not_specialize=["k", "num_lists", "num_steps", "n"])
def pair_kernel(
    scores,  # (N,)
    labels,  # (N,) compute dtype
    offsets,  # (Q + 1,) int64
    rank,  # (N,) int32
    gain,  # (N,) compute dtype
    unit,  # (N,) compute dtype
    ideal,  # (N,) compute dtype
    loss,  # out: each block's sum, or each document's (N,) with PER_DOCUMENT; compute dtype
    pairs,  # out: each block's preference pairs, int64
    grad,  # out (N,) compute dtype: dL/dscore of the list's own sum
    k,
    sigma: tl.float64,
    mu: tl.float64,
    eps: tl.float64,
    scale: tl.float64,
    num_lists,
    num_steps,
    n,
    SCHEME: tl.constexpr,
    PER_DOCUMENT: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of documents against all others of their lists: each the better or the worse one of its pairs."""
    # Scalars arrive in fp64, or fp64 scores would be computed with fp32 settings.
    sigma = tl.full([], sigma, dtype)
    mu = tl.full([], mu, dtype)
    eps = tl.full([], eps, dtype)
    scale = tl.full([], scale, dtype)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_i = i < n
    start_i, end_i = _lists_of(offsets, i, in_i, num_lists, num_steps, n)
    first = tl.min(start_i, axis=0)
    width = (tl.max(end_i, axis=0) - first).to(tl.int32)
    from_i = (start_i - first).to(tl.int32)[:, None]
    to_i = (end_i - first).to(tl.int32)[:, None]
    s_i = tl.load(scores + i, mask=in_i, other=0.0).to(dtype)[:, None]
    y_i = tl.load(labels + i, mask=in_i, other=0.0)[:, None]
    r_i = tl.load(rank + i, mask=in_i, other=1)[:, None]
    g_i = tl.load(gain + i, mask=in_i, other=0.0)[:, None]
    loss_i = tl.zeros([BLOCK], dtype)
    pull_i = tl.zeros([BLOCK], dtype)
    ideal_i = tl.zeros([BLOCK], dtype)
    pairs_i = tl.zeros([BLOCK], tl.int32)
    for tile in range(0, width, BLOCK):
        j = tile + tl.arange(0, BLOCK)
        in_j = j < width
        y_j = tl.load(labels + first + j, mask=in_j, other=0.0)[None, :]
        r_j = tl.load(rank + first + j, mask=in_j, other=1)[None, :]
        same_list = (j[None, :] >= from_i) & (j[None, :] < to_i)
        if SCHEME != 0:
            ideal_j = tl.load(ideal + first + j, mask=in_j, other=0.0)[None, :]
            ideal_i += tl.sum(tl.where(same_list, ideal_j, 0.0), axis=1)
        counts = same_list & ((k == 0) | (r_i <= k) | (r_j <= k))
        if SCHEME != 1:
            counts = counts & (y_i != y_j)
        if tl.max(tl.max(counts.to(tl.int32), axis=1), axis=0) > 0:
            s_j = tl.load(scores + first + j, mask=in_j, other=0.0).to(dtype)[None, :]
            g_j = tl.load(gain + first + j, mask=in_j, other=0.0)[None, :]
            d = sigma * (s_i - s_j)
            t = tl.exp(-tl.abs(d))
            log_sum = _log1p(t, dtype)
            inverse = 1.0 / (1.0 + t)
            if SCHEME == 1:
                # Every ordered pair, once as (i, j) and once as (j, i).
                w_i = g_i / tl.log2(1.0 + r_i.to(dtype))
                w_j = g_j / tl.log2(1.0 + r_j.to(dtype))
                term = w_i * (tl.where(d < 0, -d, 0.0) + log_sum)
                pull = w_i * tl.where(d >= 0, t, 1.0) * inverse - w_j * tl.where(d <= 0, t, 1.0) * inverse
                better = counts
            else:
                better = counts & (y_i > y_j)
                margin = tl.where(better, d, -d)  # of the better document over the worse
                weight = tl.where(better, 1.0, -1.0).to(dtype)
                if SCHEME != 0:
                    weight = weight * (_rank_weight(r_i, r_j, mu, SCHEME, dtype) * tl.abs(g_i - g_j))
                term = weight * (tl.where(margin < 0, -margin, 0.0) + log_sum)
                pull = weight * tl.where(margin >= 0, t, 1.0) * inverse
            loss_i += tl.sum(tl.where(better, term, 0.0), axis=1)
            pull_i += tl.sum(tl.where(counts, pull, 0.0), axis=1)
            pairs_i += tl.sum(better.to(tl.int32), axis=1)
    if SCHEME != 0:
        normalizer = tl.maximum(ideal_i, eps * tl.load(unit + i, mask=in_i, other=1.0))
        loss_i = loss_i / normalizer
        pull_i = pull_i / normalizer
    tl.store(grad + i, -scale * sigma * pull_i, mask=in_i)
    # Rows past the end have no pair, and a normaliser that may be 0.
    loss_i = tl.where(in_i, scale * loss_i, 0.0)
    if PER_DOCUMENT:
        tl.store(loss + i, loss_i, mask=in_i)
    else:
        tl.store(loss + tl.program_id(0), tl.sum(loss_i, axis=0))
        tl.store(pairs + tl.program_id(0), tl.sum(pairs_i.to(tl.int64), axis=0))


@triton.jit(do_not_specialize=["num_blocks", "num_lists", "n"])
def mean_kernel(
    loss,  # (num_blocks,) compute dtype
    pairs,  # (num_blocks,) int64
    grad,  # in and out (N,) compute dtype
    total,  # out () compute dtype
    num_blocks,
    num_lists,
    n,
    REDUCTION: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of the batch, and the gradient divided by what the loss is divided by."""
    loss_sum = tl.zeros([BLOCK], dtype)
    pair_sum = tl.zeros([BLOCK], tl.int64)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        loss_sum += tl.load(loss + block, mask=block < num_blocks, other=0.0)
        pair_sum += tl.load(pairs + block, mask=block < num_blocks, other=0)
    divisor = tl.full([], 1.0, dtype)
    if REDUCTION == "pairs":
        divisor = tl.maximum(tl.sum(pair_sum, axis=0), 1).to(dtype)
    elif REDUCTION == "lists":
        divisor = divisor * num_lists
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(grad + i, tl.load(grad + i, mask=i < n, other=0.0) / divisor, mask=i < n)
    if tl.program_id(0) == 0:
        tl.store(total, tl.sum(loss_sum, axis=0) / divisor)


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

    Nothing is read on the host: the grid follows from the shapes alone. Raises ValueError for CPU tensors
    outside Triton's interpreter.
    """
    if not scores.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"Triton kernels take CUDA or ROCm tensors, got tensors on {scores.device}; set TRITON_INTERPRET=1 "
            "before importing rerank_fast.ops.triton.lambda_loss to run them in the interpreter"
        )
    compute_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    dtype: Any = tl.float64 if compute_dtype == torch.float64 else tl.float32
    launch = LAUNCH_FP64 if compute_dtype == torch.float64 else LAUNCH
    n, num_lists = scores.shape[0], offsets.shape[0] - 1
    per_list = reduction == "none"
    if n == 0:
        return scores.new_zeros((num_lists,) if per_list else (), dtype=compute_dtype), scores.to(compute_dtype)

    num_blocks = triton.cdiv(n, launch["BLOCK"])
    grad, gain, unit, ideal = (torch.empty(n, dtype=compute_dtype, device=scores.device) for _ in range(4))
    rank = torch.empty(n, dtype=torch.int32, device=scores.device)
    loss = torch.empty(n if per_list else num_blocks, dtype=compute_dtype, device=scores.device)
    pairs = torch.empty(num_blocks, dtype=torch.int64, device=scores.device)
    total = torch.empty((num_lists,) if per_list else (), dtype=compute_dtype, device=scores.device)
    shape = (num_lists, (num_lists - 1).bit_length(), n)
    k = min(k, n)  # the same cut, and an int32
    scale = 1 / math.log(2) if reduction_log == "binary" else 1.0
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(scores):
        documents = (scores, labels, offsets, rank, gain, unit, ideal)
        rank_kernel[(num_blocks,)](*documents, k, *shape, dtype=dtype, **launch)
        pair_kernel[(num_blocks,)](
            *documents,
            loss,
            pairs,
            grad,
            k,
            sigma,
            mu,
            eps,
            scale,
            *shape,
            SCHEME=_SCHEMES[scheme],
            PER_DOCUMENT=per_list,
            dtype=dtype,
            **launch,
        )
        if per_list:
            list_sum_kernel[(num_lists,)](loss, offsets, total, dtype=dtype, **FINISH)
        else:
            grid = (triton.cdiv(n, FINISH["BLOCK"]),)
            mean_kernel[grid](
                loss, pairs, grad, total, num_blocks, num_lists, n, REDUCTION=reduction, dtype=dtype, **FINISH
            )
    return total, grad
