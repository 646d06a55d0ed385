"""Attention over packed sequences in Triton: one launch, whatever the lengths.

The gradients are in varlen_attention_backward.py.

Scores live in tiles; the softmax runs along with them and backward computes them again from each
query's logarithm of its sum (FlashAttention, Dao et al. 2022). A block of queries, or of keys,
belongs to one program, which sums what it owns in a fixed order: no atomics, the same bits every
time. Nothing is read on the host: sequence n takes its blocks from place cu_seqlens[n] // BLOCK + n
on, so that tokens // BLOCK + N programs suffice for any lengths.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.triton import dropout, guard, launcher
from rerank_fast.ops.triton.attention_launches import choose, launch, variants
from rerank_fast.ops.triton.attention_tiles import (
    block_of,
    has_few,
    load_tile,
    reads,
    store_tile,
    strides,
)
from rerank_fast.ops.triton.variant import Variant

RUNTIME = [
    "num_sequences",
    "num_steps",
    "num_tokens",
    "num_keys",
    "window_left",
    "window_right",
    "seed",
    "threshold",
]


@triton.jit
def share_of_cap(scores, SOFTCAP: tl.constexpr):
    """tanh(s / SOFTCAP) of scores s times log2(e), to 3e-7."""
    x = scores * (0.6931471805599453 / SOFTCAP)
    a = tl.abs(x)
    a2 = a * a
    t = tl.exp2(a * -2.8853900817779268)
    # Near 0, where 1 - t cancels, an odd polynomial.
    p = a2 * -0.00628366228 + 0.0211214516
    p = p * a2 - 0.053876318
    p = p * a2 + 0.133329332
    p = p * a2 - 0.333333313
    y = tl.where(a < 0.6, a + a * (a2 * p), (1.0 - t) / (1.0 + t))
    return tl.where(x < 0.0, -y, y)


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q,  # (Tq, heads, HEAD_SIZE)
    k,  # (Tk, kv_heads, HEAD_SIZE)
    v,
    out,  # out (Tq, heads, HEAD_SIZE)
    lse,  # out (heads, Tq) fp32, to base 2
    cu_seqlens_q,  # (N + 1,) int32
    cu_seqlens_k,
    rows,  # (Tq,) int32, or None
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    scale,  # of the scores, times log2(e)
    window_left,
    window_right,
    seed,
    threshold,
    rescale,
    num_sequences,
    num_steps,
    num_tokens,
    num_keys,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr,  # of the scores; 0: none
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A block of queries of one head against the keys that any of them may read."""
    head = tl.program_id(1)
    first, num_q, first_q, num_k, first_k, begin, end, fits = block_of(
        cu_seqlens_q, cu_seqlens_k, window_left, window_right, num_sequences, num_steps,
        num_tokens, num_keys,
        HAS_LEFT, HAS_RIGHT, BLOCK_M,
    )  # fmt: skip
    if first >= num_q:
        return
    i = first + tl.arange(0, BLOCK_M)
    in_q = i < num_q
    if fits == 0:
        nothing = tl.full([BLOCK_M, WIDTH], float("nan"), tl.float32)
        store_tile(out, nothing, out_token, out_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
        return
    place = i[:, None] + num_k - num_q
    q_tile = load_tile(q, q_token, q_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    if HAS_DROPOUT:
        streams = dropout.row_streams(seed, head, dropout.numbers(rows, first_q + i, in_q))[:, None]
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        in_k = j < num_k
        k_tile = load_tile(
            k, k_token, k_head, head // GROUP, first_k + start, in_k, HEAD_SIZE, WIDTH
        )
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        if SOFTCAP > 0:
            scores = share_of_cap(scores, SOFTCAP) * (SOFTCAP * 1.4426950408889634)
        allowed = reads(place, j[None, :], num_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
        scores = tl.where(allowed, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # So far nothing to read: any finite number keeps -inf - -inf away.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weights, axis=1)
        if HAS_DROPOUT:
            weights = weights * dropout.factors(streams, j[None, :], threshold, rescale)
        v_tile = load_tile(
            v, v_token, v_head, head // GROUP, first_k + start, in_k, HEAD_SIZE, WIDTH
        )
        result = result * fade[:, None]
        result += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        highest = higher
    # Nothing to read gives 0; where there is something, but no score above -inf, 0 / 0 gives NaN.
    first_place = i * 0
    last_place = first_place + num_k - 1
    if HAS_LEFT:
        first_place = tl.maximum(first_place, i + num_k - num_q - window_left)
    if HAS_RIGHT:
        last_place = tl.minimum(last_place, i + num_k - num_q + window_right)
    empty = first_place > last_place
    result = result / tl.where(empty, 1.0, total)[:, None]
    store_tile(out, result, out_token, out_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    log_sum = tl.where(empty, float("inf"), highest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + head.to(tl.int64) * num_tokens + first_q + i, log_sum, mask=in_q)


def constants_of(
    q: Tensor,
    k: Tensor,
    window_left: int,
    window_right: int,
    dropout_p: float,
    softcap: float | None,
) -> launcher.Config:
    _, heads, size = q.shape
    return launcher.constants(
        GROUP=heads // k.shape[1],
        HEAD_SIZE=size,
        HAS_LEFT=window_left >= 0,
        HAS_RIGHT=window_right >= 0,
        HAS_DROPOUT=dropout_p > 0,
        SOFTCAP=softcap or 0.0,  # a model has one: it is compiled in
    )


def windows(q: Tensor, k: Tensor, left: int, right: int) -> tuple[int, int]:
    """No window wider than all there is: places are added to it in 32 bits."""
    if left < 0 and right < 0:
        return left, right
    most = q.shape[0] + k.shape[0]
    return min(left, most), min(right, most)


def forward(
    q: Tensor,  # (Tq, heads, head_size), each head's row contiguous
    k: Tensor,  # (Tk, kv_heads, head_size)
    v: Tensor,
    cu_seqlens_q: Tensor,  # (N + 1,) int32
    cu_seqlens_k: Tensor,
    rows: Tensor | None,  # (Tq,) int32
    scale: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The backend contract: out (Tq, heads, head_size), and lse (heads, Tq) fp32 for backward."""
    guard.require_gpu(q)
    if q.is_cpu:
        ragged.check_ends("cu_seqlens_q", cu_seqlens_q, q.shape[0])
        ragged.check_ends("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    num_sequences = cu_seqlens_q.shape[0] - 1
    if out.numel() == 0 or num_sequences == 0:
        return out, lse
    few, capped = has_few(q, num_sequences), softcap is not None
    config = launch(q.shape[2], q.dtype, "forward", few_queries=few, capped=capped)
    kernel, config = choose(forward_kernel, config, "forward")
    num_tokens, heads = q.shape[:2]
    numbers = (
        *strides(q, k, v, out),
        scale * 1.4426950408889634,
        *windows(q, k, window_left, window_right),
        *dropout.scalars(dropout_p, seed),
        *(num_sequences, (num_sequences - 1).bit_length(), num_tokens, k.shape[0]),
    )
    launcher.launch(
        kernel,
        lambda meta: (num_tokens // meta["BLOCK_M"] + num_sequences, heads),
        (q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rows),
        numbers,
        constants_of(q, k, window_left, window_right, dropout_p, softcap),
        config,
    )
    return out, lse


def shipped() -> Iterator[Variant]:
    return variants({"forward": forward_kernel})
