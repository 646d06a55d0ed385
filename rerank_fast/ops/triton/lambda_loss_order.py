"""Documents of each list in the order the pairs of LambdaLoss are visited in: by label, within a
label by score.

In that order the documents of higher label than one's own are a run of slots, and so are those of
lower label. Short lists are put in order inside each program that needs them; for long ones that
would be done over and over, so a launch of its own does it once. Several programs may store a slot:
all the same bits, by the same instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reciprocal(x, dtype: tl.constexpr):
    """1 / x; in fp64 of an x within fp32's range: a division is a call, which takes registers."""
    if dtype == tl.float64:
        result = (1.0 / x.to(tl.float32)).to(tl.float64)
        result += result * (1.0 - x * result)
        result += result * (1.0 - x * result)
    else:
        result = 1.0 / x
    return result


@triton.jit
def log2_1p(t, dtype: tl.constexpr):
    """log2(1 + t) for t in [0, 1]: t or, in fp64, t / (2 + t) times a polynomial, without a special
    function.
    """
    if dtype == tl.float64:
        z = t * reciprocal(2.0 + t, dtype)
        w = z * z
        p = w * 0.24589530248125088 + 0.12009724262509489
        p = p * w + 0.17471280368314066
        p = p * w + 0.19188383658908023
        p = p * w + 0.2219819177490448
        p = p * w + 0.26230707333783054
        p = p * w + 0.3205989247881797
        p = p * w + 0.4121985827364002
        p = p * w + 0.5770780163582652
        p = p * w + 0.9617966939259681
        p = p * w + 2.8853900817779268
        result = z * p
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
        result = t * p * 1.44269502
    return result


@triton.jit
def store_deltas(delta, d, in_d, dtype: tl.constexpr):
    """delta(d) = 1/D(d) - 1/D(d + 1) = log2(1 + x) / (D(d) D(d + 1)), x = 1 / (1 + d): no
    cancellation.
    """
    distance = 1.0 + tl.maximum(d, 1).to(dtype)
    log = tl.log2(distance)
    step = log2_1p(reciprocal(distance, dtype), dtype)
    tl.store(
        delta + d, tl.where(d > 0, step * reciprocal(log * (log + step), dtype), 0.0), mask=in_d
    )


@triton.jit
def lists_of(offsets, i, in_i, num_lists, num_steps, n):
    """Each document's list, and that list's bounds: n and 0 where in_i is false.

    Whatever the offsets say, lists lie in 0 to n and all documents of one agree on it. A document
    of which they say nothing that makes sense is a list of its own.
    """
    low = tl.zeros(i.shape, tl.int64)
    high = low + (num_lists - 1)
    # Of the offsets that were met, the largest at or before i and the least after it. Where a
    # list's bounds lie between them, every document from one bound to the other meets the same
    # offsets, and finds the same list.
    before = low
    after = low + n
    # The last list that begins at or before i: the lists that share its beginning with it are
    # empty.
    for _ in range(num_steps):
        middle = (low + high + 1) // 2
        offset = tl.load(offsets + middle)
        begins = offset <= i
        before = tl.where(begins, tl.maximum(before, offset), before)
        after = tl.where(begins, after, tl.minimum(after, offset))
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    start = tl.load(offsets + low)
    end = tl.load(offsets + low + 1)
    holds = (start >= before) & (start <= i) & (i < end) & (end <= after)
    start = tl.where(holds, start, i)
    end = tl.where(holds, end, i + 1)
    return low, tl.where(in_i, start, n), tl.where(in_i, end, 0)


@triton.jit
def order_rows(
    scores,
    labels,
    offsets,
    slots,  # out, as are ranks and places: see order_kernel
    stride,
    ranks,
    places,
    i,  # (BLOCK,) int64 documents
    shortest,  # only documents of lists from shortest to longest are put in order
    longest,
    num_lists,
    num_steps,
    n,
    largest_score,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Stores documents at their slots, by counting how many documents of the list go before
    each.
    """
    _, start_i, end_i = lists_of(offsets, i, i < n, num_lists, num_steps, n)
    size_i = end_i - start_i
    in_i = (i < n) & (size_i >= shortest) & (size_i <= longest)
    first = tl.min(tl.where(in_i, start_i, n), axis=0)
    # 0 if there is no such list.
    width = (tl.max(tl.where(in_i, end_i, first), axis=0) - first).to(tl.int32)
    # From here on documents are counted from `first`: 32 bits suffice.
    from_i = (start_i - first).to(tl.int32)[:, None]
    to_i = (end_i - first).to(tl.int32)[:, None]
    own = (i - first).to(tl.int32)[:, None]
    s_i = tl.load(scores + i, mask=in_i, other=0.0).to(dtype)
    y_i = tl.load(labels + i, mask=in_i, other=0.0)
    # NaN goes first. Its comparisons are all false: as a label it stands beside infinity.
    score_i = s_i[:, None]
    nan_i = score_i != score_i
    label_i = tl.where(y_i != y_i, float("inf"), y_i)[:, None]
    above = tl.zeros([BLOCK, TILE], tl.int32)
    ahead = tl.zeros([BLOCK, TILE], tl.int32)
    largest = tl.full([BLOCK, TILE], 0.0, dtype)
    for tile in range(0, width, TILE):
        j = tile + tl.arange(0, TILE)
        s_j = tl.load(scores + first + j, mask=j < width, other=0.0).to(dtype)[None, :]
        y_j = tl.load(labels + first + j, mask=j < width, other=0.0)
        y_j = tl.where(y_j != y_j, float("inf"), y_j)[None, :]
        nan_j = s_j != s_j
        j = j[None, :]
        same_list = (j >= from_i) & (j < to_i)
        # A score that is NaN or too large is seen as an infinite label is.
        top_j = tl.where(tl.abs(s_j) <= largest_score, y_j, float("inf"))
        largest = tl.maximum(largest, tl.where(same_list, top_j, 0.0))
        # Equal scores, and two NaNs, keep the input order.
        equal = (s_j == score_i) | (nan_j & nan_i)
        before = (s_j > score_i) | (nan_j & (nan_i == 0)) | (equal & (j < own))
        above += (before & same_list).to(tl.int32)
        ahead += (((y_j > label_i) | ((y_j == label_i) & before)) & same_list).to(tl.int32)
    slot = start_i + tl.sum(ahead, axis=1)
    rank = tl.sum(above, axis=1) + 1
    top = tl.max(largest, axis=1)
    tl.store(slots + slot, s_i, mask=in_i)
    tl.store(slots + stride + slot, y_i, mask=in_i)
    # Gains are divided by 2^max label: large labels stay finite. Those of a list that diverged are
    # all NaN.
    gain = tl.exp2(tl.maximum(y_i, 0.0) - top) - tl.exp2(-top)
    tl.store(slots + 2 * stride + slot, gain + (top - top), mask=in_i)
    tl.store(slots + 3 * stride + slot, reciprocal(tl.log2(1.0 + rank.to(dtype)), dtype), mask=in_i)
    tl.store(ranks + slot, rank, mask=in_i)
    tl.store(places + slot, i, mask=in_i)


@triton.jit(do_not_specialize=["stride", "shortest", "num_lists", "num_steps", "n"])
def order_kernel(
    scores,  # (N,)
    labels,  # (N,) compute dtype
    offsets,  # (Q + 1,) int64
    # out (5, stride) compute dtype, by slot: score, label, gain / 2^max label, 1 / D(rank); then
    # delta(d)
    slots,
    ranks,  # out (N,) int32, by slot: 1-based rank
    places,  # out (N,) int64, by slot: which document is there
    stride,
    shortest,
    num_lists,
    num_steps,
    n,
    largest_score: tl.float64,  # above it, or NaN, a score is divergence
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """A block of documents, those in lists of at least `shortest` documents; and all of delta."""
    stride = tl.cast(stride, tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    store_deltas(slots + 4 * stride, i, i < n, dtype)
    order_rows(
        scores, labels, offsets, slots, stride, ranks, places, i, shortest, n, num_lists,
        num_steps, n,
        tl.full([], largest_score, dtype), dtype, BLOCK, TILE,
    )  # fmt: skip


# What a block has for the number of its pairs where the offsets do not rise from 0 to n.
AT_FAULT = tl.constexpr(-1)


@triton.jit
def offsets_at_fault(offsets, num_lists, n, BLOCK: tl.constexpr):
    """1 where this program's share of the offsets does not rise, begin at 0 or end at n, else 0."""
    wrong = tl.zeros([BLOCK], tl.int32)
    for first in range(tl.program_id(0) * BLOCK, num_lists, tl.num_programs(0) * BLOCK):
        q = first + tl.arange(0, BLOCK)
        there = q < num_lists
        start = tl.load(offsets + q, mask=there, other=0)
        end = tl.load(offsets + q + 1, mask=there, other=0)
        falls = (start > end) | ((q == 0) & (start != 0)) | ((q == num_lists - 1) & (end != n))
        wrong += (falls & there).to(tl.int32)
    return (tl.max(wrong, axis=0) > 0).to(tl.int32)
