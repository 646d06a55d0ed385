"""Preference pairs of LambdaLoss: a block of slots (lambda_loss_order.py) against the rest of their
lists.

A program owns a block of consecutive slots, so that many short lists share a program and a long
list is spread over many. It visits only the runs of slots that hold its documents' preference
pairs, in tiles; nothing of size D x D is stored and a list may have any length. Every document's
gradient is summed by the one program that owns its slot, in a fixed order: no atomics, the same
bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rerank_fast.ops.triton.lambda_loss_order import (
    AT_FAULT,
    lists_of,
    log2_1p,
    offsets_at_fault,
    order_rows,
    reciprocal,
    store_deltas,
)


@triton.jit
def _visit(
    slots,
    stride,
    ranks,
    deltas,
    low,  # first column
    high,  # after the last column
    from_i,  # (BLOCK, 1) each row's own first column
    to_i,  # (BLOCK, 1) and the one after its last
    s_i,
    g_i,
    inverse_i,
    r_i,
    k,
    slope,  # sigma / ln 2
    mu,
    # Which documents: "better" or "worse" than the row's, or "all" for NDCGLoss1.
    COLUMNS: tl.constexpr,
    SCHEME: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows against columns: what each row adds to the loss (over ln 2), its pull, and the pairs it
    is better in.

    The loss of a pair is summed in the row of its better document alone.
    """
    loss = tl.zeros([BLOCK, TILE], dtype)
    pull = tl.zeros([BLOCK, TILE], dtype)
    count = tl.zeros([BLOCK, TILE], tl.int32)
    top_i = r_i <= k
    for tile in range(low, high, TILE):
        j = tile + tl.arange(0, TILE)
        in_j = j < high
        s_j = tl.load(slots + j, mask=in_j, other=0.0)[None, :]
        r_j = tl.load(ranks + j, mask=in_j, other=1)[None, :]
        if SCHEME != "none":
            g_j = tl.load(slots + 2 * stride + j, mask=in_j, other=0.0)[None, :]
        if SCHEME != "none" and SCHEME != "ndcg2":
            inverse_j = tl.load(slots + 3 * stride + j, mask=in_j, other=0.0)[None, :]
        j = j[None, :]
        counts = (j >= from_i) & (j < to_i) & (top_i | (r_j <= k))
        if SCHEME != "none" and SCHEME != "ndcg1":
            if SCHEME != "lambdarank":
                delta = tl.load(deltas + tl.abs(r_i - r_j))
            if SCHEME == "ndcg2":
                weight = delta
            else:
                weight = tl.abs(inverse_i - inverse_j)
                if SCHEME == "ndcg2pp":
                    weight = mu * delta + weight
            weight = weight * (g_j - g_i if COLUMNS == "better" else g_i - g_j)
        if COLUMNS == "better":
            x = slope * (s_j - s_i)
            # sigmoid of minus the margin
            if dtype == tl.float64:
                t = tl.exp2(-tl.abs(x))
                lost = tl.where(x >= 0, t, 1.0) * reciprocal(1.0 + t, dtype)
            else:  # where 2^x overflows it is 0
                lost = 1.0 / (1.0 + tl.exp2(x))
            pull += tl.where(counts, -lost if SCHEME == "none" else -weight * lost, 0.0)
        else:
            x = slope * (s_i - s_j)
            t = tl.exp2(-tl.abs(x))
            inverse = reciprocal(1.0 + t, dtype)
            term = tl.where(x < 0, -x, 0.0) + log2_1p(t, dtype)
            lost = tl.where(x >= 0, t, 1.0) * inverse
            if SCHEME == "ndcg1":
                weight = g_i * inverse_i
                # Every ordered pair, as (i, j) and as (j, i).
                both = weight * lost - g_j * inverse_j * (tl.where(x <= 0, t, 1.0) * inverse)
            else:
                both = lost if SCHEME == "none" else weight * lost
            loss += tl.where(counts, term if SCHEME == "none" else weight * term, 0.0)
            pull += tl.where(counts, both, 0.0)
            count += counts.to(tl.int32)
    return tl.sum(loss, axis=1), tl.sum(pull, axis=1), tl.sum(count, axis=1)


@triton.jit
def _label_run(labels, own, from_i, to_i, y_i, num_steps):
    """The run of slots with each row's own label, by bisection: labels fall from from_i to to_i."""
    low, begin = from_i, own
    finish, high = own + 1, to_i
    for _ in range(num_steps):
        middle = (low + begin) // 2
        open_ = low < begin
        greater = tl.load(labels + middle, mask=open_, other=0.0) > y_i
        low = tl.where(open_ & greater, middle + 1, low)
        begin = tl.where(open_ & (greater == 0), middle, begin)
        middle = (finish + high) // 2
        open_ = finish < high
        less = tl.load(labels + middle, mask=open_, other=0.0) < y_i
        high = tl.where(open_ & less, middle, high)
        finish = tl.where(open_ & (less == 0), middle + 1, finish)
    return begin, finish


@triton.jit
def _ideal_dcg(
    gains, from_i, to_i, k, dtype: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """The ideal DCG@k of each row's list over 2^max label; columns are in the ideal order."""
    low = tl.min(from_i, axis=0)
    high = tl.max(to_i, axis=0)
    if low == tl.max(from_i, axis=0):  # one list: its sum is every row's
        WIDE: tl.constexpr = 8 * TILE
        total = tl.zeros([WIDE], dtype)
        for tile in range(low, tl.minimum(high, low + k), WIDE):
            j = tile + tl.arange(0, WIDE)
            gain = tl.load(gains + j, mask=(j < high) & (j - low < k), other=0.0)
            total += gain * reciprocal(tl.log2(2.0 + (j - low).to(dtype)), dtype)
        ideal = tl.zeros([BLOCK], dtype) + tl.sum(total, axis=0)
    else:
        sums = tl.zeros([BLOCK, TILE], dtype)
        for tile in range(low, high, TILE):
            j = tile + tl.arange(0, TILE)
            gain = tl.load(gains + j, mask=j < high, other=0.0)[None, :]
            place = j[None, :] - from_i[:, None]
            counts = (place >= 0) & (j[None, :] < to_i[:, None]) & (place < k)
            discount = reciprocal(tl.log2(2.0 + tl.maximum(place, 0).to(dtype)), dtype)
            sums += tl.where(counts, gain * discount, 0.0)
        ideal = tl.sum(sums, axis=1)
    return ideal


@triton.jit(
    do_not_specialize=["stride", "k", "longest", "num_lists", "list_steps", "slot_steps", "n"]
)
def pair_kernel(
    scores,  # (N,)
    labels,  # (N,) compute dtype
    offsets,  # (Q + 1,) int64
    slots,  # (5, stride) compute dtype: see order_kernel; written here for the lists sorted here
    ranks,  # (N,) int32, by slot
    places,  # (N,) int64, by slot
    loss,  # out: each block's sum, or each slot's (N,) with PER_SLOT; compute dtype
    pairs,  # out: each block's preference pairs, int64, or AT_FAULT
    grad,  # out (N,) compute dtype: dL/dscore of the list's own sum
    stride,
    k,
    slope: tl.float64,  # sigma / ln 2
    mu: tl.float64,
    eps: tl.float64,
    loss_scale: tl.float64,
    pull_scale: tl.float64,
    largest_score: tl.float64,  # above it, or NaN, a score is divergence
    longest,
    num_lists,
    list_steps,
    slot_steps,
    n,
    SCHEME: tl.constexpr,
    PER_SLOT: tl.constexpr,
    ORDERED: tl.constexpr,  # order_kernel has run: the lists longer than `longest` are in order
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """A block of slots against the rest of their lists: each document the better or the worse one
    of its pairs.
    """
    # Scalars arrive in fp64, or fp64 scores would be computed with fp32 settings.
    slope = tl.full([], slope, dtype)
    mu = tl.full([], mu, dtype)
    stride = tl.cast(stride, tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_i = i < n
    _, start_i, end_i = lists_of(offsets, i, in_i, num_lists, list_steps, n)
    first = tl.min(start_i, axis=0)
    last_end = tl.max(end_i, axis=0)
    # The lists put in order here: long ones can only be the first and the last of the block.
    is_short = in_i & (end_i - start_i <= longest)
    row = tl.min(tl.where(is_short, start_i, n), axis=0)
    short_end = tl.max(tl.where(is_short, end_i, 0), axis=0)
    # Slots are counted from `first`: 32 bits suffice. Rows past the end have an empty list.
    own = tl.where(in_i, i - first, 0).to(tl.int32)
    from_i = tl.where(in_i, start_i - first, 0).to(tl.int32)
    to_i = tl.where(in_i, end_i - first, 0).to(tl.int32)
    while row < short_end:
        order_rows(
            scores, labels, offsets, slots, stride, ranks, places, row + tl.arange(0, BLOCK), 0,
            longest,
            num_lists, list_steps, n, tl.full([], largest_score, dtype), dtype, BLOCK, TILE,
        )  # fmt: skip
        row += BLOCK
    if not ORDERED:
        for tile in range(0, last_end - first, BLOCK * TILE):
            d = tile + tl.arange(0, BLOCK * TILE)
            store_deltas(slots + 4 * stride, d, d < last_end - first, dtype)
    tl.debug_barrier()
    deltas = slots + 4 * stride
    slots += first
    ranks += first
    s_i = tl.load(slots + own)[:, None]
    y_i = tl.load(slots + stride + own)
    g_i = tl.load(slots + 2 * stride + own)[:, None]
    inverse_i = tl.load(slots + 3 * stride + own)[:, None]
    r_i = tl.load(ranks + own)[:, None]
    last = tl.max(to_i, axis=0)
    if SCHEME == "ndcg1":
        loss_i, pull_i, count_i = _visit(
            slots, stride, ranks, deltas, 0, last, from_i[:, None], to_i[:, None], s_i, g_i,
            inverse_i, r_i,
            k, slope, mu, "all", SCHEME, dtype, BLOCK, TILE,
        )  # fmt: skip
    else:
        begin_i, finish_i = _label_run(slots + stride, own, from_i, to_i, y_i, slot_steps)
        finish_i = tl.where(to_i > from_i, finish_i, last)
        _, pull_i, _ = _visit(
            slots, stride, ranks, deltas, 0, tl.max(tl.where(begin_i > from_i, begin_i, 0), axis=0),
            from_i[:, None], begin_i[:, None], s_i, g_i, inverse_i, r_i,
            k, slope, mu, "better", SCHEME, dtype, BLOCK, TILE,
        )  # fmt: skip
        loss_i, won_i, count_i = _visit(
            slots, stride, ranks, deltas, tl.min(finish_i, axis=0), last,
            finish_i[:, None], to_i[:, None], s_i, g_i, inverse_i, r_i,
            k, slope, mu, "worse", SCHEME, dtype, BLOCK, TILE,
        )  # fmt: skip
        pull_i += won_i
    at_fault = offsets_at_fault(offsets, num_lists, n, BLOCK)
    count = tl.sum(count_i.to(tl.int64), axis=0)
    tl.store(pairs + tl.program_id(0), tl.where(at_fault != 0, AT_FAULT, count))
    in_i = to_i > from_i
    loss_i *= tl.full([], loss_scale, dtype)
    pull_i *= tl.full([], pull_scale, dtype)
    # Of the first slot the gain is 1 - 2^-max label, or NaN where the list diverged.
    first_gain_i = tl.load(slots + 2 * stride + from_i)
    if SCHEME == "none":
        diverged_i = first_gain_i != first_gain_i
        loss_i = tl.where(diverged_i, first_gain_i, loss_i)
        pull_i = tl.where(diverged_i, first_gain_i, pull_i)
    else:
        ideal_i = _ideal_dcg(slots + 2 * stride, from_i, to_i, k, dtype, BLOCK, TILE)
        unit_i = 1.0 - first_gain_i  # what eps is over
        normalizer = tl.maximum(ideal_i, tl.full([], eps, dtype) * unit_i, tl.PropagateNan.ALL)
        loss_i = loss_i / normalizer
        pull_i = pull_i / normalizer
    tl.store(grad + tl.load(places + first + own), pull_i, mask=in_i)
    # Rows past the end have no pair, and a normaliser that may be 0.
    loss_i = tl.where(in_i, loss_i, 0.0)
    if PER_SLOT:
        tl.store(loss + first + own, loss_i, mask=in_i)
    else:
        tl.store(loss + tl.program_id(0), tl.sum(loss_i, axis=0))
