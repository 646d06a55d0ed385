"""LambdaLoss in Triton: pairs, and the mean, after the long lists' order; at most three launches, whatever the lists.

A program owns a block of consecutive slots (lambda_loss_order.py), so that many short lists share a program and a
long list is spread over many. It visits only the runs of slots that hold its documents' preference pairs, in tiles;
nothing of size D x D is stored and a list may have any length. Every document's gradient is summed by the one
program that owns its slot, and sums are taken in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.triton.lambda_loss_order import lists_of, log2_1p, order_kernel, order_rows, store_deltas

_SCHEMES = {"none": 0, "ndcg1": 1, "ndcg2": 2, "lambdarank": 3, "ndcg2pp": 4}
# Documents of a list that each of its blocks puts in order itself. In a batch of at most SMALL_BATCH documents every
# list is; in larger ones lists longer than SHORT_LIST get their order from a launch of its own, which costs less than
# doing it again in each of their blocks.
SMALL_BATCH, SHORT_LIST = 1024, 256
# 16 warps on 32 x 32 pairs are 2 pairs a thread: with 4 the row state alone fills 64 registers, half the occupancy.
PAIRS = {"BLOCK": 32, "TILE": 32, "num_warps": 16, "maxnreg": 64, "enable_fp_fusion": True}
PAIRS_FP64 = {"BLOCK": 16, "TILE": 32, "num_warps": 8, "enable_fp_fusion": True}
FINISH = {"BLOCK": 1024, "num_warps": 4}


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
    COLUMNS: tl.constexpr,  # which documents: "better" or "worse" than the row's, or "all" for NDCGLoss1
    SCHEME: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows against columns: what each row adds to the loss (over ln 2), its pull, and how many pairs it is better in.

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
        if SCHEME != 0:
            g_j = tl.load(slots + 2 * stride + j, mask=in_j, other=0.0)[None, :]
        if SCHEME != 0 and SCHEME != 2:
            inverse_j = tl.load(slots + 3 * stride + j, mask=in_j, other=0.0)[None, :]
        j = j[None, :]
        counts = (j >= from_i) & (j < to_i) & (top_i | (r_j <= k))
        if SCHEME >= 2:
            if SCHEME != 3:
                delta = tl.load(deltas + tl.abs(r_i - r_j))
            if SCHEME == 2:
                weight = delta
            else:
                weight = tl.abs(inverse_i - inverse_j)
                if SCHEME == 4:
                    weight = mu * delta + weight
            weight = weight * (g_j - g_i if COLUMNS == "better" else g_i - g_j)
        if COLUMNS == "better":
            # sigmoid of minus the margin; where 2^x overflows it is 0.
            x = slope * (s_j - s_i)
            lost = 1.0 / (1.0 + tl.exp2(x))
            pull += tl.where(counts, -lost if SCHEME == 0 else -weight * lost, 0.0)
        else:
            x = slope * (s_i - s_j)
            t = tl.exp2(-tl.abs(x))
            inverse = 1.0 / (1.0 + t)
            term = tl.where(x < 0, -x, 0.0) + log2_1p(t, dtype)
            lost = tl.where(x >= 0, t, 1.0) * inverse
            if SCHEME == 1:
                weight = g_i * inverse_i
                # Every ordered pair, as (i, j) and as (j, i).
                both = weight * lost - g_j * inverse_j * (tl.where(x <= 0, t, 1.0) * inverse)
            else:
                both = lost if SCHEME == 0 else weight * lost
            loss += tl.where(counts, term if SCHEME == 0 else weight * term, 0.0)
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
def _ideal_dcg(gains, from_i, to_i, k, dtype: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The ideal DCG@k of each row's list over 2^max label; columns are in the ideal order."""
    low = tl.min(from_i, axis=0)
    high = tl.max(to_i, axis=0)
    if low == tl.max(from_i, axis=0):  # one list: its sum is every row's
        WIDE: tl.constexpr = 8 * TILE
        total = tl.zeros([WIDE], dtype)
        for tile in range(low, tl.minimum(high, low + k), WIDE):
            j = tile + tl.arange(0, WIDE)
            gain = tl.load(gains + j, mask=(j < high) & (j - low < k), other=0.0)
            total += gain / tl.log2(2.0 + (j - low).to(dtype))
        ideal = tl.zeros([BLOCK], dtype) + tl.sum(total, axis=0)
    else:
        sums = tl.zeros([BLOCK, TILE], dtype)
        for tile in range(low, high, TILE):
            j = tile + tl.arange(0, TILE)
            gain = tl.load(gains + j, mask=j < high, other=0.0)[None, :]
            place = j[None, :] - from_i[:, None]
            counts = (place >= 0) & (j[None, :] < to_i[:, None]) & (place < k)
            sums += tl.where(counts, gain / tl.log2(2.0 + tl.maximum(place, 0).to(dtype)), 0.0)
        ideal = tl.sum(sums, axis=1)
    return ideal


@triton.jit(do_not_specialize=["stride", "k", "longest", "num_lists", "list_steps", "slot_steps", "n"])
def pair_kernel(
    scores,  # (N,)
    labels,  # (N,) compute dtype
    offsets,  # (Q + 1,) int64
    slots,  # (5, stride) compute dtype: see order_kernel; written here for the lists sorted here
    stride,
    ranks,  # (N,) int32, by slot
    places,  # (N,) int32, by slot
    loss,  # out: each block's sum, or each slot's (N,) with PER_SLOT; compute dtype
    pairs,  # out: each block's preference pairs, int64
    grad,  # out (N,) compute dtype: dL/dscore of the list's own sum
    k,
    sigma: tl.float64,
    mu: tl.float64,
    eps: tl.float64,
    scale: tl.float64,
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
    """A block of slots against the rest of their lists: each document the better or the worse one of its pairs."""
    # Scalars arrive in fp64, or fp64 scores would be computed with fp32 settings.
    slope = tl.full([], sigma * 1.4426950408889634, dtype)
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
    while row < short_end:
        order_rows(
            scores, labels, offsets, slots, stride, ranks, places, row + tl.arange(0, BLOCK), 0, longest,
            num_lists, list_steps, n, dtype, BLOCK, TILE,
        )  # fmt: skip
        row += BLOCK
    if not ORDERED:
        for tile in range(0, last_end - first, BLOCK * TILE):
            d = tile + tl.arange(0, BLOCK * TILE)
            store_deltas(slots + 4 * stride, d, d < last_end - first, dtype)
    tl.debug_barrier()
    # From here on slots are counted from `first`: 32 bits suffice. Rows past the end have an empty list.
    deltas = slots + 4 * stride
    slots += first
    ranks += first
    own = tl.where(in_i, i - first, 0).to(tl.int32)
    from_i = tl.where(in_i, start_i - first, 0).to(tl.int32)
    to_i = tl.where(in_i, end_i - first, 0).to(tl.int32)
    s_i = tl.load(slots + own)[:, None]
    y_i = tl.load(slots + stride + own)
    g_i = tl.load(slots + 2 * stride + own)[:, None]
    inverse_i = tl.load(slots + 3 * stride + own)[:, None]
    r_i = tl.load(ranks + own)[:, None]
    last = tl.max(to_i, axis=0)
    if SCHEME == 1:
        loss_i, pull_i, count_i = _visit(
            slots, stride, ranks, deltas, 0, last, from_i[:, None], to_i[:, None], s_i, g_i, inverse_i, r_i,
            k, slope, mu, "all", SCHEME, dtype, BLOCK, TILE,
        )  # fmt: skip
    else:
        begin_i, finish_i = _label_run(slots + stride, own, from_i, to_i, y_i, slot_steps)
        finish_i = tl.where(in_i, finish_i, last)
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
    loss_i *= tl.full([], 0.6931471805599453 * scale, dtype)
    pull_i *= tl.full([], -sigma * scale, dtype)
    if SCHEME != 0:
        ideal_i = _ideal_dcg(slots + 2 * stride, from_i, to_i, k, dtype, BLOCK, TILE)
        largest_i = tl.maximum(tl.load(slots + stride + from_i), 0.0)
        normalizer = tl.maximum(ideal_i, tl.full([], eps, dtype) * tl.exp2(-largest_i), tl.PropagateNan.ALL)
        loss_i = loss_i / normalizer
        pull_i = pull_i / normalizer
    tl.store(grad + start_i + tl.load(places + first + own), pull_i, mask=in_i)
    # Rows past the end have no pair, and a normaliser that may be 0.
    loss_i = tl.where(in_i, loss_i, 0.0)
    if PER_SLOT:
        tl.store(loss + i, loss_i, mask=in_i)
    else:
        tl.store(loss + tl.program_id(0), tl.sum(loss_i, axis=0))
        tl.store(pairs + tl.program_id(0), tl.sum(tl.where(in_i, count_i, 0).to(tl.int64), axis=0))


@triton.jit(do_not_specialize=["num_blocks", "n"])
def mean_kernel(
    loss,  # (num_blocks,) compute dtype
    pairs,  # (num_blocks,) int64
    grad,  # in and out (N,) compute dtype
    total,  # out () compute dtype
    num_blocks,
    n,
    OVER_PAIRS: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of the batch; with OVER_PAIRS loss and gradient are divided by the batch's preference pairs."""
    loss_sum = tl.zeros([BLOCK], dtype)
    pair_sum = tl.zeros([BLOCK], tl.int64)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        loss_sum += tl.load(loss + block, mask=block < num_blocks, other=0.0)
        if OVER_PAIRS:
            pair_sum += tl.load(pairs + block, mask=block < num_blocks, other=0)
    divisor = tl.full([], 1.0, dtype)
    if OVER_PAIRS:
        divisor = tl.maximum(tl.sum(pair_sum, axis=0), 1).to(dtype)
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
    """Each list's sum of its slots' terms."""
    start = tl.load(offsets + tl.program_id(0))
    size = (tl.load(offsets + tl.program_id(0) + 1) - start).to(tl.int32)
    total = tl.zeros([BLOCK], dtype)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(loss + start + i, mask=i < size, other=0.0)
    tl.store(list_loss + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["num_lists", "list_steps", "n"])
def backward_kernel(
    grad,  # (N,) compute dtype
    grad_loss,  # () or, with PER_LIST, (Q,)
    offsets,  # (Q + 1,) int64
    grad_scores,  # out (N,)
    num_lists,
    list_steps,
    n,
    PER_LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_i = i < n
    if PER_LIST:
        own_list, _, _ = lists_of(offsets, i, in_i, num_lists, list_steps, n)
        upstream = tl.load(grad_loss + own_list)
    else:
        upstream = tl.load(grad_loss)
    product = tl.load(grad + i, mask=in_i, other=0.0) * upstream
    # Rounded after the product: a loss scale reaches fp16 gradients first.
    tl.store(grad_scores + i, product.to(grad_scores.dtype.element_ty), mask=in_i)


def launch_config(wide: bool) -> dict[str, Any]:
    """Constants and launch options of order_kernel and pair_kernel; wide for fp64."""
    launch = dict(PAIRS_FP64 if wide else PAIRS)
    if torch.version.hip:
        launch.pop("maxnreg", None)  # CUDA's alone
    return launch


def _require_gpu(tensor: Tensor) -> None:
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"Triton kernels take CUDA or ROCm tensors, got tensors on {tensor.device}; set TRITON_INTERPRET=1 "
            "before importing rerank_fast.ops.triton.lambda_loss to run them in the interpreter"
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
    """The backend contract: the loss, () or (Q,), and dL/dscores (N,), in fp32 or, for fp64 scores, fp64.

    Nothing is read on the host: grids and kernels follow from the shapes alone. Raises ValueError for CPU tensors
    outside Triton's interpreter.
    """
    _require_gpu(scores)
    compute_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    dtype: Any = tl.float64 if compute_dtype == torch.float64 else tl.float32
    n, num_lists = scores.shape[0], offsets.shape[0] - 1
    per_list = reduction == "none"
    if n == 0:
        return scores.new_zeros((num_lists,) if per_list else (), dtype=compute_dtype), scores.to(compute_dtype)

    launch = launch_config(compute_dtype == torch.float64)
    longest = SMALL_BATCH if n <= SMALL_BATCH else SHORT_LIST
    ordered = n > longest
    num_blocks = triton.cdiv(n, launch["BLOCK"])
    stride = triton.cdiv(n, 64) * 64  # rows aligned whatever n: one compiled kernel
    device = scores.device
    slots = torch.empty((5, stride), dtype=compute_dtype, device=device)
    ranks, places = torch.empty((2, stride), dtype=torch.int32, device=device).unbind()
    loss = torch.empty(n if per_list else num_blocks, dtype=compute_dtype, device=device)
    pairs = torch.empty(num_blocks, dtype=torch.int64, device=device)
    grad = torch.empty(n, dtype=compute_dtype, device=device)
    total = torch.empty((num_lists,) if per_list else (), dtype=compute_dtype, device=device)
    list_steps = (num_lists - 1).bit_length()
    scale = (1 / math.log(2) if reduction_log == "binary" else 1.0) / (num_lists if reduction == "lists" else 1)
    documents = (scores, labels, offsets, slots, stride, ranks, places)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(scores):
        if ordered:
            order_kernel[(num_blocks,)](*documents, longest + 1, num_lists, list_steps, n, dtype=dtype, **launch)
        pair_kernel[(num_blocks,)](
            *documents,
            loss,
            pairs,
            grad,
            min(k or n, n),  # no cut is a cut after the last rank
            sigma,
            mu,
            eps,
            scale,
            longest,
            num_lists,
            list_steps,
            n.bit_length(),
            n,
            SCHEME=_SCHEMES[scheme],
            PER_SLOT=per_list,
            ORDERED=ordered,
            dtype=dtype,
            **launch,
        )
        if per_list:
            list_sum_kernel[(num_lists,)](loss, offsets, total, dtype=dtype, **FINISH)
        else:
            over_pairs = reduction == "pairs"
            grid = (triton.cdiv(n, FINISH["BLOCK"]) if over_pairs else 1,)
            mean_kernel[grid](loss, pairs, grad, total, num_blocks, n, OVER_PAIRS=over_pairs, dtype=dtype, **FINISH)
    return total, grad


def backward(
    grad: Tensor,  # (N,)
    grad_loss: Tensor,  # () or (Q,)
    offsets: Tensor,  # (Q + 1,) int64
    dtype: torch.dtype,
) -> Tensor:
    """dL/dscores (N,) in dtype, from forward's gradient and the loss's own, in one launch."""
    _require_gpu(grad)
    n, num_lists = grad.shape[0], offsets.shape[0] - 1
    grad_scores = torch.empty(n, dtype=dtype, device=grad.device)
    if n:
        with torch.cuda.device_of(grad):
            backward_kernel[(triton.cdiv(n, FINISH["BLOCK"]),)](
                grad,
                grad_loss,
                offsets,
                grad_scores,
                num_lists,
                (num_lists - 1).bit_length(),
                n,
                PER_LIST=grad_loss.dim() == 1,
                **FINISH,
            )
    return grad_scores
