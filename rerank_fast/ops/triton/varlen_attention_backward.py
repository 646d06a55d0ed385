"""The gradients of varlen_attention in Triton: two launches, the queries' and that of keys and
values.

Either computes the weights again from each query's logarithm of its sum. A program sums what it
owns in a fixed order: no atomics, the same bits every time. The sums over its rows, of which biases
of q, k and v have their gradients, it leaves in a row of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.registry import declare
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
from rerank_fast.ops.triton.varlen_attention import (
    RUNTIME,
    constants_of,
    share_of_cap,
    windows,
)


@triton.jit
def _tile_grads(
    own,  # (BLOCK, WIDTH) queries, or keys
    other,  # the other of the two, and so below
    own_upstream,  # of queries the gradients of their results, of keys the values
    other_upstream,
    lse,
    along,
    allowed,
    kept,  # the factors of the dropout
    log2_scale,
    SOFTCAP: tl.constexpr,
):
    """Of a tile of (own, other): the weights as they were used, and the gradient of the scores
    before they were capped.
    """
    scores = tl.dot(own, tl.trans(other), input_precision="ieee") * log2_scale
    if SOFTCAP > 0:
        share = share_of_cap(scores, SOFTCAP)
        scores = share * (SOFTCAP * 1.4426950408889634)
    weights = tl.where(allowed, tl.exp2(scores - lse), 0.0)
    upstream = tl.dot(own_upstream, tl.trans(other_upstream), input_precision="ieee")
    d_scores = weights * (upstream * kept - along)
    if SOFTCAP > 0:
        d_scores *= 1.0 - share * share
    return weights * kept, d_scores


@triton.jit
def _store_sums(
    sums, width, first, head, tile, in_rows, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """A program's sum over the rows of its tile, from column first on of a row of this width."""
    e = tl.arange(0, WIDTH)
    total = tl.sum(tl.where(in_rows[:, None], tile, 0.0), axis=0)
    tl.store(
        sums + tl.program_id(0).to(tl.int64) * width + first + head * HEAD_SIZE + e,
        total,
        mask=e < HEAD_SIZE,
    )


@triton.jit(do_not_specialize=RUNTIME)
def query_grad_kernel(
    q,
    k,
    v,
    out,
    lse,
    grad_out,
    dq,  # out (Tq, heads, HEAD_SIZE)
    along,  # out (heads, Tq) fp32: sum of out * grad_out, which the softmax takes off
    sums,  # out (programs, heads * HEAD_SIZE) fp32: of dq over each program's rows; or None
    cu_seqlens_q,
    cu_seqlens_k,
    rows,
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
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradient of a block of queries of one head."""
    head = tl.program_id(1)
    first, num_q, first_q, num_k, first_k, begin, end, fits = block_of(
        cu_seqlens_q, cu_seqlens_k, window_left, window_right, num_sequences, num_steps,
        num_tokens, num_keys,
        HAS_LEFT, HAS_RIGHT, BLOCK_M,
    )  # fmt: skip
    # Of a row of sums: one more argument costs the compiler registers.
    width = tl.num_programs(1) * HEAD_SIZE
    if first >= num_q:
        if sums is not None:
            none, of_none = tl.zeros([BLOCK_M, WIDTH], tl.float32), tl.zeros([BLOCK_M], tl.int1)
            _store_sums(sums, width, 0, head, none, of_none, HEAD_SIZE, WIDTH)
        return
    i = first + tl.arange(0, BLOCK_M)
    in_q = i < num_q
    if fits == 0:
        nothing = tl.full([BLOCK_M, WIDTH], float("nan"), tl.float32)
        store_tile(dq, nothing, dq_token, dq_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
        if sums is not None:
            _store_sums(sums, width, 0, head, nothing, in_q, HEAD_SIZE, WIDTH)
        return
    place = i[:, None] + num_k - num_q
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
    result = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        in_k = j < num_k
        k_tile = load_tile(
            k, k_token, k_head, head // GROUP, first_k + start, in_k, HEAD_SIZE, WIDTH
        )
        v_tile = load_tile(
            v, v_token, v_head, head // GROUP, first_k + start, in_k, HEAD_SIZE, WIDTH
        )
        kept = 1.0
        if HAS_DROPOUT:
            kept = dropout.factors(streams, j[None, :], threshold, rescale)
        allowed = reads(place, j[None, :], num_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
        _, d_scores = _tile_grads(
            q_tile,
            k_tile,
            grad_tile,
            v_tile,
            lse_i[:, None],
            along_i[:, None],
            allowed,
            kept,
            log2_scale,
            SOFTCAP,
        )
        result += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision="ieee")
    result *= scale
    store_tile(dq, result, dq_token, dq_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    if sums is not None:
        _store_sums(sums, width, 0, head, result, in_q, HEAD_SIZE, WIDTH)


@triton.jit(do_not_specialize=RUNTIME)
def key_value_grad_kernel(
    q,
    k,
    v,
    lse,
    along,
    grad_out,
    dk,  # out (Tk, kv_heads, HEAD_SIZE)
    dv,
    # out (programs, 2 * kv_heads * HEAD_SIZE) fp32: of dk and dv over each program's rows; or None
    sums,
    cu_seqlens_q,
    cu_seqlens_k,
    rows,
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
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of a block of keys and values, from all heads that share them. Tiles are (keys,
    queries).
    """
    kv_head = tl.program_id(1)
    first, num_k, first_k, num_q, first_q, begin, end, fits = block_of(
        cu_seqlens_k, cu_seqlens_q, window_right, window_left, num_sequences, num_steps, num_keys,
        num_tokens,
        HAS_RIGHT, HAS_LEFT, BLOCK_N,
    )  # fmt: skip
    values = tl.num_programs(1) * HEAD_SIZE  # where their sums begin in a row
    if first >= num_k:
        if sums is not None:
            none, of_none = tl.zeros([BLOCK_N, WIDTH], tl.float32), tl.zeros([BLOCK_N], tl.int1)
            _store_sums(sums, 2 * values, 0, kv_head, none, of_none, HEAD_SIZE, WIDTH)
            _store_sums(sums, 2 * values, values, kv_head, none, of_none, HEAD_SIZE, WIDTH)
        return
    # Not before: what lives across the branch takes registers that the loop then lacks.
    j = first + tl.arange(0, BLOCK_N)
    in_k = j < num_k
    if fits == 0:
        nothing = tl.full([BLOCK_N, WIDTH], float("nan"), tl.float32)
        store_tile(dk, nothing, dk_token, dk_head, kv_head, first_k + first, in_k, HEAD_SIZE, WIDTH)
        store_tile(dv, nothing, dv_token, dv_head, kv_head, first_k + first, in_k, HEAD_SIZE, WIDTH)
        if sums is not None:
            _store_sums(sums, 2 * values, 0, kv_head, nothing, in_k, HEAD_SIZE, WIDTH)
            _store_sums(sums, 2 * values, values, kv_head, nothing, in_k, HEAD_SIZE, WIDTH)
        return
    k_tile = load_tile(k, k_token, k_head, kv_head, first_k + first, in_k, HEAD_SIZE, WIDTH)
    v_tile = load_tile(v, v_token, v_head, kv_head, first_k + first, in_k, HEAD_SIZE, WIDTH)
    d_key = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    d_value = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for start in range(begin, end, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
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
            place = i[None, :] + num_k - num_q
            allowed = reads(
                place, j[:, None], num_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
            )
            weights, d_scores = _tile_grads(
                k_tile,
                q_tile,
                v_tile,
                grad_tile,
                lse_i,
                along_i,
                allowed,
                kept,
                log2_scale,
                SOFTCAP,
            )
            d_value += tl.dot(weights.to(grad_tile.dtype), grad_tile, input_precision="ieee")
            d_key += tl.dot(d_scores.to(q_tile.dtype), q_tile, input_precision="ieee")
    d_key *= scale
    store_tile(dk, d_key, dk_token, dk_head, kv_head, first_k + first, in_k, HEAD_SIZE, WIDTH)
    store_tile(dv, d_value, dv_token, dv_head, kv_head, first_k + first, in_k, HEAD_SIZE, WIDTH)
    if sums is not None:
        _store_sums(sums, 2 * values, 0, kv_head, d_key, in_k, HEAD_SIZE, WIDTH)
        _store_sums(sums, 2 * values, values, kv_head, d_value, in_k, HEAD_SIZE, WIDTH)


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
    softcap: float | None = None,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of q, k and v, written to `into` where it is given."""
    guard.require_gpu(q)
    grads = into or [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    places = (cu_seqlens_q, cu_seqlens_k, rows)
    options = (scale, window_left, window_right, dropout_p, seed, softcap)
    attention_grads(q, k, v, out, lse, grad_out, *places, *grads, None, None, *options)
    return grads[0], grads[1], grads[2]


def sums_for(q: Tensor, k: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Room for the sums that attention_grads leaves: of the queries' gradients, and of keys' and
    values'.
    """
    made = []
    for tensor, part, block, count in ((q, "queries", "BLOCK_M", 1), (k, "keys", "BLOCK_N", 2)):
        rows = launch(q.shape[2], q.dtype, part, few_queries=has_few(q, num_sequences))[block]
        programs = tensor.shape[0] // rows + num_sequences
        width = count * tensor.shape[1] * tensor.shape[2]
        made.append(torch.empty(programs, width, dtype=torch.float32, device=q.device))
    return made[0], made[1]


@declare("attention_grads", mutates=("dq", "dk", "dv", "q_sums", "kv_sums"))
def attention_grads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q_sums: Tensor | None,
    kv_sums: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: int,
    softcap: float | None = None,
) -> None:
    """The gradients of q, k and v to where dq, dk and dv lie, each head's row contiguous; see
    sums_for.
    """
    num_sequences = cu_seqlens_q.shape[0] - 1
    if num_sequences == 0 or q.is_meta:
        return
    along, few, capped = torch.empty_like(lse), has_few(q, num_sequences), softcap is not None
    places = (cu_seqlens_q, cu_seqlens_k, rows)
    options = (
        scale,
        scale * 1.4426950408889634,
        *windows(q, k, window_left, window_right),
        *dropout.scalars(dropout_p, seed),
        num_sequences,
        (num_sequences - 1).bit_length(),
        q.shape[0],
        k.shape[0],
    )
    constants = constants_of(q, k, window_left, window_right, dropout_p, softcap)
    if dq.numel():
        config = launch(q.shape[2], q.dtype, "queries", few_queries=few, capped=capped)
        kernel, rest = choose(query_grad_kernel, config, "queries")
        launcher.launch(
            kernel,
            lambda meta: (q.shape[0] // meta["BLOCK_M"] + num_sequences, q.shape[1]),
            (q, k, v, out, lse, grad_out, dq, along, q_sums, *places),
            (*strides(q, k, v, out, grad_out, dq), *options),
            constants,
            rest,
        )
    if dk.numel():
        config = launch(q.shape[2], q.dtype, "keys", few_queries=few, capped=capped)
        kernel, rest = choose(key_value_grad_kernel, config, "keys")
        launcher.launch(
            kernel,
            lambda meta: (k.shape[0] // meta["BLOCK_N"] + num_sequences, k.shape[1]),
            (q, k, v, lse, along, grad_out, dk, dv, kv_sums, *places),
            (*strides(q, k, v, grad_out, dk, dv), *options),
            constants,
            rest,
        )


def shipped() -> Iterator[Variant]:
    return variants({"queries": query_grad_kernel, "keys": key_value_grad_kernel})
