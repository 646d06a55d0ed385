"""The gradients of attention with relative positions in Triton: the queries', and the keys' and
values'. Those of the tables are in relative_table_grads.py.

A query's gradient has, beside the keys', rows of the table that it was multiplied with: the scores'
gradients of a tile are sheared to (BLOCK, 2 * BLOCK), by query and distance, and multiplied with
the tile's rows. Sums are in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.relative_positions import RelativePositions
from rerank_fast.ops.triton import dropout, guard, launcher
from rerank_fast.ops.triton.attention_tiles import block_of, has_few, load_tile, store_tile, strides
from rerank_fast.ops.triton.relative_attention import (
    RUNTIME,
    launch,
    places_of,
    query_place,
    relative_scores,
    sheared,
    slots_from,
    table_rows,
    variants,
)
from rerank_fast.ops.triton.relative_table_grads import table_grads
from rerank_fast.ops.triton.variant import Variant


@triton.jit
def by_distance(d_scores, other, there, BLOCK: tl.constexpr):
    """(BLOCK, 2 * BLOCK): of a (BLOCK, BLOCK) tile of (own, other) each row's elements by distance.

    other: (BLOCK, 2 * BLOCK) which of the other side's rows a distance leads to; there: whether it
    is in the tile.
    """
    own = tl.arange(0, BLOCK)[:, None] * BLOCK
    return tl.where(
        there, sheared(d_scores, own + tl.where(there, other, 0), BLOCK, 2 * BLOCK), 0.0
    )


@triton.jit(do_not_specialize=RUNTIME)
def relative_query_grad_kernel(
    q,
    k,
    v,
    out,
    lse,
    grad_out,
    dq,  # out (Tq, heads, HEAD_SIZE)
    along,  # out (heads, Tq) fp32: sum of out * grad_out, which the softmax takes off
    cu_seqlens_q,
    cu_seqlens_k,
    rows,
    slots,
    keys,
    queries,
    bias,
    query_places,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    grad_token,
    grad_head,
    dq_token,
    dq_head,
    scale,
    log2_scale,  # scale times log2(e)
    seed,
    threshold,
    rescale,
    num_sequences,
    num_steps,
    num_tokens,
    num_keys,
    reach,
    num_slots,
    HEAD_SIZE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradient of a block of queries of one head."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    first, num_q, first_q, num_k, first_k, begin, end, fits = block_of(
        cu_seqlens_q, cu_seqlens_k, 0, 0, num_sequences, num_steps, num_tokens, num_keys,
        False, False, BLOCK,
    )  # fmt: skip
    if first >= num_q:
        return
    a = tl.arange(0, BLOCK)
    i = first + a
    in_q = i < num_q
    if fits == 0:
        nothing = tl.full([BLOCK, WIDTH], float("nan"), tl.float32)
        store_tile(dq, nothing, dq_token, dq_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
        return
    at = query_place(query_places, first_q + first, first + num_k - num_q)
    q_tile = load_tile(q, q_token, q_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    grad_tile = load_tile(
        grad_out, grad_token, grad_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH
    )
    out_tile = load_tile(out, out_token, out_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    along_i = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), axis=1)
    flat = head.to(tl.int64) * num_tokens + first_q + i
    tl.store(along + flat, along_i, mask=in_q)
    lse_i = tl.load(lse + flat, mask=in_q, other=float("inf"))
    if HAS_DROPOUT:
        streams = dropout.row_streams(seed, head, dropout.numbers(rows, first_q + i, in_q))[:, None]
    result = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK):
        j = start + a
        in_k = j < num_k
        k_tile = load_tile(k, k_token, k_head, head, first_k + start, in_k, HEAD_SIZE, WIDTH)
        v_tile = load_tile(v, v_token, v_head, head, first_k + start, in_k, HEAD_SIZE, WIDTH)
        own_slots = slots_from(slots, at - start - (BLOCK - 1), reach, num_slots, 2 * BLOCK)
        scores = relative_scores(
            q_tile, k_tile, keys, queries, bias, own_slots,
            a[:, None] - a[None, :] + BLOCK - 1, heads, head, log2_scale, 1.4426950408889634,
            HEAD_SIZE, WIDTH, BLOCK,
        )  # fmt: skip
        kept = 1.0
        if HAS_DROPOUT:
            kept = dropout.factors(streams, j[None, :], threshold, rescale)
        weights = tl.where(in_k[None, :], tl.exp2(scores - lse_i[:, None]), 0.0)
        upstream = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        d_scores = weights * (upstream * kept - along_i[:, None])
        result += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision="ieee")
        if keys is not None:
            b = a[:, None] - tl.arange(0, 2 * BLOCK)[None, :] + BLOCK - 1
            moved = by_distance(d_scores, b, (b >= 0) & (b < BLOCK), BLOCK)
            table = table_rows(keys, own_slots, heads, head, HEAD_SIZE, WIDTH)
            result += tl.dot(moved.to(table.dtype), table, input_precision="ieee")
    store_tile(dq, result * scale, dq_token, dq_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)


@triton.jit(do_not_specialize=RUNTIME)
def relative_key_value_grad_kernel(
    q,
    k,
    v,
    lse,
    along,
    grad_out,
    dk,  # out (Tk, heads, HEAD_SIZE)
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    rows,
    slots,
    keys,
    queries,
    bias,
    query_places,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    grad_token,
    grad_head,
    dk_token,
    dk_head,
    dv_token,
    dv_head,
    scale,
    log2_scale,
    seed,
    threshold,
    rescale,
    num_sequences,
    num_steps,
    num_tokens,
    num_keys,
    reach,
    num_slots,
    HEAD_SIZE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of a block of keys and values of one head. Tiles are (keys, queries)."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    first, num_k, first_k, num_q, first_q, begin, end, fits = block_of(
        cu_seqlens_k, cu_seqlens_q, 0, 0, num_sequences, num_steps, num_keys, num_tokens,
        False, False, BLOCK,
    )  # fmt: skip
    if first >= num_k:
        return
    b = tl.arange(0, BLOCK)
    j = first + b
    in_k = j < num_k
    if fits == 0:
        nothing = tl.full([BLOCK, WIDTH], float("nan"), tl.float32)
        store_tile(dk, nothing, dk_token, dk_head, head, first_k + first, in_k, HEAD_SIZE, WIDTH)
        store_tile(dv, nothing, dv_token, dv_head, head, first_k + first, in_k, HEAD_SIZE, WIDTH)
        return
    k_tile = load_tile(k, k_token, k_head, head, first_k + first, in_k, HEAD_SIZE, WIDTH)
    v_tile = load_tile(v, v_token, v_head, head, first_k + first, in_k, HEAD_SIZE, WIDTH)
    d_key = tl.zeros([BLOCK, WIDTH], tl.float32)
    d_value = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK):
        i = start + b
        in_q = i < num_q
        if HAS_DROPOUT:
            streams = dropout.row_streams(seed, head, dropout.numbers(rows, first_q + i, in_q))[
                None, :
            ]
        q_tile = load_tile(q, q_token, q_head, head, first_q + start, in_q, HEAD_SIZE, WIDTH)
        grad_tile = load_tile(
            grad_out, grad_token, grad_head, head, first_q + start, in_q, HEAD_SIZE, WIDTH
        )
        flat = head.to(tl.int64) * num_tokens + first_q + i
        lse_i = tl.load(lse + flat, mask=in_q, other=float("inf"))[None, :]
        along_i = tl.load(along + flat, mask=in_q, other=0.0)[None, :]
        kept = 1.0
        if HAS_DROPOUT:
            kept = dropout.factors(streams, j[:, None], threshold, rescale)
        at = query_place(query_places, first_q + start, start + num_k - num_q)
        own_slots = slots_from(slots, at - first - (BLOCK - 1), reach, num_slots, 2 * BLOCK)
        scores = relative_scores(
            k_tile, q_tile, queries, keys, bias, own_slots,
            b[None, :] - b[:, None] + BLOCK - 1, heads, head, log2_scale, 1.4426950408889634,
            HEAD_SIZE, WIDTH, BLOCK,
        )  # fmt: skip
        weights = tl.where(in_k[:, None], tl.exp2(scores - lse_i), 0.0)
        upstream = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
        d_scores = weights * (upstream * kept - along_i)
        d_value += tl.dot((weights * kept).to(grad_tile.dtype), grad_tile, input_precision="ieee")
        d_key += tl.dot(d_scores.to(q_tile.dtype), q_tile, input_precision="ieee")
        if queries is not None:
            a = b[:, None] + tl.arange(0, 2 * BLOCK)[None, :] - (BLOCK - 1)
            moved = by_distance(d_scores, a, (a >= 0) & (a < BLOCK), BLOCK)
            table = table_rows(queries, own_slots, heads, head, HEAD_SIZE, WIDTH)
            d_key += tl.dot(moved.to(table.dtype), table, input_precision="ieee")
    store_tile(dk, d_key * scale, dk_token, dk_head, head, first_k + first, in_k, HEAD_SIZE, WIDTH)
    store_tile(dv, d_value, dv_token, dv_head, head, first_k + first, in_k, HEAD_SIZE, WIDTH)


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
    window_left: int,  # -1, as the next: relative positions have no window
    window_right: int,
    dropout_p: float,
    seed: int,
    relative: RelativePositions,
) -> tuple[Tensor | None, ...]:
    """The backend contract: the gradients of q, k, v, and of relative.keys, queries and bias; None
    for what there is not.
    """
    guard.require_gpu(q)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    along = torch.empty_like(lse)
    num_sequences = cu_seqlens_q.shape[0] - 1
    places = places_of(cu_seqlens_q, cu_seqlens_k, rows, relative)
    options = (
        scale,
        scale * 1.4426950408889634,
        *dropout.scalars(dropout_p, seed),
        num_sequences,
        (num_sequences - 1).bit_length(),
        q.shape[0],
        k.shape[0],
        relative.reach,
        relative.num_slots,
    )
    constants = launcher.constants(HEAD_SIZE=q.shape[2], HAS_DROPOUT=dropout_p > 0)
    if dq.numel():
        config = launch(q.shape[2], q.dtype, "queries", few_queries=has_few(q, num_sequences))
        launcher.launch(
            relative_query_grad_kernel,
            (q.shape[0] // config["BLOCK"] + num_sequences, q.shape[1]),
            (q, k, v, out, lse, grad_out, dq, along, *places),
            (*strides(q, k, v, out, grad_out, dq), *options),
            constants,
            config,
        )
    if dk.numel():
        config = launch(q.shape[2], q.dtype, "keys", few_queries=has_few(q, num_sequences))
        launcher.launch(
            relative_key_value_grad_kernel,
            (k.shape[0] // config["BLOCK"] + num_sequences, k.shape[1]),
            (q, k, v, lse, along, grad_out, dk, dv, *places),
            (*strides(q, k, v, grad_out, dk, dv), *options),
            constants,
            config,
        )
    tables = table_grads(
        q, k, v, lse, along, grad_out, cu_seqlens_q, cu_seqlens_k, rows, relative, scale,
        dropout_p, seed,
    )  # fmt: skip
    return dq, dk, dv, *tables


def shipped() -> Iterator[Variant]:
    return variants({"queries": relative_query_grad_kernel, "keys": relative_key_value_grad_kernel})
