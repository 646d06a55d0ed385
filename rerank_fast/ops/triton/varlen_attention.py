"""Attention over packed sequences in Triton: one launch forward, two backward, whatever the lengths.

Scores live in tiles; the softmax runs along with them and backward computes them again from each query's logarithm
of its sum (FlashAttention, Dao et al. 2022). A block of queries, or of keys, belongs to one program, which sums
what it owns in a fixed order: no atomics, the same bits every time. Nothing is read on the host: sequence n takes
its blocks from place cu_seqlens[n] // BLOCK + n on, so that tokens // BLOCK + N programs suffice for any lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.triton import dropout, guard

MAX_HEAD_SIZE = 256


def launch(head_size: int, dtype: torch.dtype, *, few_queries: bool, backward: bool) -> dict[str, int]:
    """The one configuration of a case: tiles that stay in registers and shared memory, from sm_80 to gfx942."""
    width = max(16, triton.next_power_of_2(head_size))
    warps = 4
    if dtype == torch.float32:  # exact products go through the FMA units: a thread holds all of its tile
        rows = keys = 32 if width <= 32 else 16
    elif width <= 32:
        rows, keys = 64, 64
    elif width <= 64:
        rows, keys = 64, 32 if backward else 64
    elif width <= 128:
        rows, keys = 32 if backward else 64, 32
    else:
        rows, keys = 32, 32
        warps = 8 if backward else 4
    if few_queries:
        rows = 16
    return {"BLOCK_M": rows, "BLOCK_N": keys, "WIDTH": width, "num_warps": warps, "num_stages": 2}


@triton.jit
def _sequence_of(block, cu_seqlens, num_sequences, num_steps, BLOCK: tl.constexpr):
    """The sequence that owns a block, its row that the block begins with, its first token and its length."""
    low = block * 0
    high = low + num_sequences - 1
    for _ in range(num_steps):
        middle = (low + high + 1) // 2
        begins = tl.load(cu_seqlens + middle) // BLOCK + middle <= block
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    first = tl.load(cu_seqlens + low)
    return low, (block - first // BLOCK - low) * BLOCK, first, tl.load(cu_seqlens + low + 1) - first


@triton.jit
def _places(token_stride, head_stride, head, token, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Where a (BLOCK, WIDTH) tile of one head begins, and its elements from there: the tile's own fit 32 bits."""
    start = token.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    return start, tl.arange(0, BLOCK)[:, None] * token_stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _there(in_rows, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    there = in_rows[:, None]
    if HEAD_SIZE != WIDTH:
        there = there & (tl.arange(0, WIDTH) < HEAD_SIZE)[None, :]
    return there


@triton.jit
def _load(
    tensor,
    token_stride,
    head_stride,
    head,
    token,  # the tile's first
    in_rows,  # (BLOCK,)
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A (BLOCK, WIDTH) tile of one head; 0 where nothing is."""
    start, places = _places(token_stride, head_stride, head, token, in_rows.shape[0], WIDTH)
    return tl.load(tensor + start + places, mask=_there(in_rows, HEAD_SIZE, WIDTH), other=0.0)


@triton.jit
def _store(
    tensor, tile, token_stride, head_stride, head, token, in_rows, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    start, places = _places(token_stride, head_stride, head, token, in_rows.shape[0], WIDTH)
    tl.store(tensor + start + places, tile.to(tensor.dtype.element_ty), mask=_there(in_rows, HEAD_SIZE, WIDTH))


@triton.jit
def _allowed(
    place,  # of the queries, counted as the keys
    j,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    allowed = (place >= 0) | (place < 0) | (j < 0)
    if HAS_LEFT:
        allowed = allowed & (j >= place - window_left)
    if HAS_RIGHT:
        allowed = allowed & (j <= place + window_right)
    return allowed


_RUNTIME = ["num_sequences", "num_steps", "num_tokens", "window_left", "window_right", "seed", "threshold"]


@triton.jit(do_not_specialize=_RUNTIME)
def forward_kernel(
    q,  # (Tq, heads, HEAD_SIZE)
    k,  # (Tk, kv_heads, HEAD_SIZE)
    v,
    out,  # out (Tq, heads, HEAD_SIZE)
    lse,  # out (heads, Tq) fp32, to base 2
    cu_seqlens_q,  # (N + 1,) int32
    cu_seqlens_k,
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
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A block of queries of one head against the keys that any of them may read."""
    head = tl.program_id(1)
    n, first, first_q, num_q = _sequence_of(tl.program_id(0), cu_seqlens_q, num_sequences, num_steps, BLOCK_M)
    if first >= num_q:
        return
    first_k = tl.load(cu_seqlens_k + n)
    num_k = tl.load(cu_seqlens_k + n + 1) - first_k
    shift = num_k - num_q
    i = first + tl.arange(0, BLOCK_M)
    in_q = i < num_q
    q_tile = _load(q, q_token, q_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    if HAS_DROPOUT:
        streams = dropout.row_streams(seed, head, first_q + i)[:, None]
    begin = first * 0
    end = num_k
    if HAS_LEFT:
        begin = tl.maximum(begin, first + shift - window_left)
    if HAS_RIGHT:
        end = tl.minimum(end, tl.minimum(first + BLOCK_M, num_q) + shift + window_right)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        in_k = j < num_k
        k_tile = _load(k, k_token, k_head, head // GROUP, first_k + start, in_k, HEAD_SIZE, WIDTH)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        reads = _allowed(i[:, None] + shift, j[None, :], window_left, window_right, HAS_LEFT, HAS_RIGHT)
        scores = tl.where(reads & in_k[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # So far nothing to read: any finite number keeps -inf - -inf away.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weights, axis=1)
        if HAS_DROPOUT:
            weights = weights * dropout.factors(streams, j[None, :], threshold, rescale)
        v_tile = _load(v, v_token, v_head, head // GROUP, first_k + start, in_k, HEAD_SIZE, WIDTH)
        result = result * fade[:, None]
        result += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        highest = higher
    empty = total == 0.0
    result = result / tl.where(empty, 1.0, total)[:, None]
    _store(out, result, out_token, out_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    log_sum = tl.where(empty, float("inf"), highest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + head.to(tl.int64) * num_tokens + first_q + i, log_sum, mask=in_q)


@triton.jit(do_not_specialize=_RUNTIME)
def query_grad_kernel(
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
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradient of a block of queries of one head."""
    head = tl.program_id(1)
    n, first, first_q, num_q = _sequence_of(tl.program_id(0), cu_seqlens_q, num_sequences, num_steps, BLOCK_M)
    if first >= num_q:
        return
    first_k = tl.load(cu_seqlens_k + n)
    num_k = tl.load(cu_seqlens_k + n + 1) - first_k
    shift = num_k - num_q
    i = first + tl.arange(0, BLOCK_M)
    in_q = i < num_q
    q_tile = _load(q, q_token, q_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    grad_tile = _load(grad_out, grad_token, grad_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    out_tile = _load(out, out_token, out_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    along_i = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), axis=1)
    flat = head.to(tl.int64) * num_tokens + first_q + i
    tl.store(along + flat, along_i, mask=in_q)
    lse_i = tl.load(lse + flat, mask=in_q, other=float("inf"))
    if HAS_DROPOUT:
        streams = dropout.row_streams(seed, head, first_q + i)[:, None]
    begin = first * 0
    end = num_k
    if HAS_LEFT:
        begin = tl.maximum(begin, first + shift - window_left)
    if HAS_RIGHT:
        end = tl.minimum(end, tl.minimum(first + BLOCK_M, num_q) + shift + window_right)
    result = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        in_k = j < num_k
        k_tile = _load(k, k_token, k_head, head // GROUP, first_k + start, in_k, HEAD_SIZE, WIDTH)
        v_tile = _load(v, v_token, v_head, head // GROUP, first_k + start, in_k, HEAD_SIZE, WIDTH)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * log2_scale
        reads = _allowed(i[:, None] + shift, j[None, :], window_left, window_right, HAS_LEFT, HAS_RIGHT)
        weights = tl.where(reads & in_k[None, :], tl.exp2(scores - lse_i[:, None]), 0.0)
        upstream = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        if HAS_DROPOUT:
            upstream = upstream * dropout.factors(streams, j[None, :], threshold, rescale)
        d_scores = weights * (upstream - along_i[:, None])
        result += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision="ieee")
    _store(dq, result * scale, dq_token, dq_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)


@triton.jit(do_not_specialize=_RUNTIME)
def key_value_grad_kernel(
    q,
    k,
    v,
    lse,
    along,
    grad_out,
    dk,  # out (Tk, kv_heads, HEAD_SIZE)
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
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
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of a block of keys and values, from all heads that share them. Tiles are (keys, queries)."""
    kv_head = tl.program_id(1)
    n, first, first_k, num_k = _sequence_of(tl.program_id(0), cu_seqlens_k, num_sequences, num_steps, BLOCK_N)
    if first >= num_k:
        return
    first_q = tl.load(cu_seqlens_q + n)
    num_q = tl.load(cu_seqlens_q + n + 1) - first_q
    shift = num_k - num_q
    j = first + tl.arange(0, BLOCK_N)
    in_k = j < num_k
    k_tile = _load(k, k_token, k_head, kv_head, first_k + first, in_k, HEAD_SIZE, WIDTH)
    v_tile = _load(v, v_token, v_head, kv_head, first_k + first, in_k, HEAD_SIZE, WIDTH)
    begin = first * 0
    end = num_q
    if HAS_RIGHT:
        begin = tl.maximum(begin, first - window_right - shift)
    if HAS_LEFT:
        end = tl.minimum(end, tl.minimum(first + BLOCK_N, num_k) + window_left - shift)
    d_key = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    d_value = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for start in range(begin, end, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            in_q = i < num_q
            q_tile = _load(q, q_token, q_head, head, first_q + start, in_q, HEAD_SIZE, WIDTH)
            grad_tile = _load(grad_out, grad_token, grad_head, head, first_q + start, in_q, HEAD_SIZE, WIDTH)
            flat = head.to(tl.int64) * num_tokens + first_q + i
            lse_i = tl.load(lse + flat, mask=in_q, other=float("inf"))[None, :]
            along_i = tl.load(along + flat, mask=in_q, other=0.0)[None, :]
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * log2_scale
            reads = _allowed(i[None, :] + shift, j[:, None], window_left, window_right, HAS_LEFT, HAS_RIGHT)
            weights = tl.where(reads & in_k[:, None], tl.exp2(scores - lse_i), 0.0)
            upstream = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
            if HAS_DROPOUT:
                streams = dropout.row_streams(seed, head, first_q + i)[None, :]
                kept = dropout.factors(streams, j[:, None], threshold, rescale)
                d_value += tl.dot((weights * kept).to(grad_tile.dtype), grad_tile, input_precision="ieee")
                upstream = upstream * kept
            else:
                d_value += tl.dot(weights.to(grad_tile.dtype), grad_tile, input_precision="ieee")
            d_scores = weights * (upstream - along_i)
            d_key += tl.dot(d_scores.to(q_tile.dtype), q_tile, input_precision="ieee")
    _store(dk, d_key * scale, dk_token, dk_head, kv_head, first_k + first, in_k, HEAD_SIZE, WIDTH)
    _store(dv, d_value, dv_token, dv_head, kv_head, first_k + first, in_k, HEAD_SIZE, WIDTH)


def _constants(q: Tensor, k: Tensor, window_left: int, window_right: int, dropout_p: float) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_SIZE": q.shape[2],
        "HAS_LEFT": window_left >= 0,
        "HAS_RIGHT": window_right >= 0,
        "HAS_DROPOUT": dropout_p > 0,
    }


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def forward(
    q: Tensor,  # (Tq, heads, head_size), each head's row contiguous
    k: Tensor,  # (Tk, kv_heads, head_size)
    v: Tensor,
    cu_seqlens_q: Tensor,  # (N + 1,) int32
    cu_seqlens_k: Tensor,
    scale: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The backend contract: out (Tq, heads, head_size), and lse (heads, Tq) fp32 for backward."""
    guard.require_gpu(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    num_sequences = cu_seqlens_q.shape[0] - 1
    if out.numel() == 0 or num_sequences == 0:
        return out, lse
    config = launch(q.shape[2], q.dtype, few_queries=q.shape[0] <= 16 * num_sequences, backward=False)
    grid = (q.shape[0] // config["BLOCK_M"] + num_sequences, q.shape[1])
    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be the tensors'
        forward_kernel[grid](
            *(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k),
            *_strides(q, k, v, out),
            scale * 1.4426950408889634,
            window_left,
            window_right,
            *dropout.scalars(dropout_p, seed),
            num_sequences,
            (num_sequences - 1).bit_length(),
            q.shape[0],
            **_constants(q, k, window_left, window_right, dropout_p),
            **config,
        )
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
    scale: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of q, k and v."""
    guard.require_gpu(q)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    along = torch.empty_like(lse)
    num_sequences = cu_seqlens_q.shape[0] - 1
    if num_sequences == 0:
        return dq, dk, dv
    config = launch(q.shape[2], q.dtype, few_queries=q.shape[0] <= 16 * num_sequences, backward=True)
    ends = (cu_seqlens_q, cu_seqlens_k)
    options = (
        scale,
        scale * 1.4426950408889634,
        window_left,
        window_right,
        *dropout.scalars(dropout_p, seed),
        num_sequences,
        (num_sequences - 1).bit_length(),
        q.shape[0],
    )
    constants = _constants(q, k, window_left, window_right, dropout_p) | config
    with torch.cuda.device_of(q):
        if dq.numel():
            query_grad_kernel[(q.shape[0] // config["BLOCK_M"] + num_sequences, q.shape[1])](
                *(q, k, v, out, lse, grad_out, dq, along, *ends),
                *_strides(q, k, v, out, grad_out, dq),
                *options,
                **constants,
            )
        if dk.numel():
            key_value_grad_kernel[(k.shape[0] // config["BLOCK_N"] + num_sequences, k.shape[1])](
                *(q, k, v, lse, along, grad_out, dk, dv, *ends),
                *_strides(q, k, v, grad_out, dk, dv),
                *options,
                **constants,
            )
    return dq, dk, dv


def shipped() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int], list[str]]]:
    """(name, kernel, argument types, constants, {num_warps, num_stages}, multiples of 16) of what ships.

    For reports that compile ahead of time: every head size class and dtype, plain, with dropout and a window, and
    for a single query a sequence.
    """
    cases = [(torch.bfloat16, size) for size in (32, 64, 128, 256)] + [(torch.float16, 64)]
    cases += [(torch.float32, size) for size in (32, 64, 128, 256)]
    for dtype, size in cases:
        name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        for few, options in ((False, False), (False, True), (True, False)):
            for kernel in (forward_kernel, query_grad_kernel, key_value_grad_kernel):
                config = launch(size, dtype, few_queries=few, backward=kernel is not forward_kernel)
                how = {key: config.pop(key) for key in ("num_warps", "num_stages")}
                constants = {"GROUP": 1, "HEAD_SIZE": size, "HAS_LEFT": options, "HAS_RIGHT": options}
                constants |= {"HAS_DROPOUT": options, **config}
                types = {argument: _argument_type(argument, name) for argument in kernel.arg_names}
                types |= dict.fromkeys(constants, "constexpr")
                variant = "dropout_window" if options else "one_query" if few else "plain"
                # What Triton finds at a launch: aligned tensors, and strides of head sizes of a multiple of 16.
                whole = [a for a in types if types[a].startswith("*") or a.endswith(("_token", "_head"))]
                yield f"{kernel.__name__}_{name}_{size}_{variant}", kernel, types, constants, how, whole


def _argument_type(argument: str, dtype: str) -> str:
    if argument in ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"):
        return f"*{dtype}"
    if argument in ("lse", "along"):
        return "*fp32"
    if argument.startswith("cu_seqlens"):
        return "*i32"
    return "fp32" if argument in ("scale", "log2_scale", "rescale") else "i32"
