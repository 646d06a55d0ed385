"""Attention with relative positions over packed sequences in Triton: the forward kernel, and what
the gradients' kernels share with it.

Within a tile of BLOCK queries and BLOCK keys a distance i - j is one of 2 * BLOCK - 1. The product
of the queries with the tables' rows of these distances, a (BLOCK, 2 * BLOCK) tile of which element
(a, a - b + BLOCK - 1) belongs to query a and key b, is sheared into place. No score, and no row of
a table for each query, ever lies in memory. The gradients are in relative_attention_backward.py and
relative_table_grads.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.relative_positions import RelativePositions
from rerank_fast.ops.triton import dropout, guard, launcher
from rerank_fast.ops.triton.attention_tiles import (
    block_of,
    has_few,
    load_tile,
    store_tile,
    strides,
)
from rerank_fast.ops.triton.grid import next_power_of_2
from rerank_fast.ops.triton.variant import Variant

# The results, and the gradients of queries, of keys and values, and of the tables.
Part = Literal["forward", "queries", "keys", "tables"]


@functools.cache
def launch(
    head_size: int, dtype: torch.dtype, part: Part, *, few_queries: bool, hip: bool = guard.HIP
) -> launcher.Config:
    """The one configuration of a case, from sm_80 to gfx942: the widest blocks that stay in
    registers. There are as many queries as keys in one: 2 * BLOCK is then a power of two. Beside
    heads wider than 128, in fp32 64, the tables' rows would spill: the op refuses them.
    """
    width = max(16, next_power_of_2(head_size))
    block = 32 if dtype != torch.float32 and width <= 64 and not few_queries else 16
    warps = 8 if dtype == torch.float32 or part == "tables" else 4
    single = part == "keys" and few_queries
    stages = 1 if part == "tables" or single else 2
    if hip:  # a warp has 64 threads, and what a second stage holds would spill
        warps, stages = 4, 1
        block = 16 if part == "tables" else block
    blocks = {"BLOCK": block, "WIDTH": width}
    config = blocks | {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    # What ptxas would rather spill than take, on one target or another.
    if part == "forward" and width >= 64 and dtype == torch.float32:
        config["maxnreg"] = 128
    elif part == "forward" and width == 128:
        config["maxnreg"] = 168
    elif part == "queries" and few_queries:
        config["maxnreg"] = 192
    elif single or (part == "tables" and dtype == torch.float32):
        config["maxnreg"] = 255
    return launcher.Config(guard.for_vendor(config, hip))


@triton.jit
def slots_from(
    slots,  # (2 * reach + 1,) int32
    first,  # distance
    reach,
    num_slots,
    COUNT: tl.constexpr,
):
    """(COUNT,) slots of the distances from the first on; none outside of the tables."""
    distance = first + tl.arange(0, COUNT)
    found = tl.load(slots + reach + tl.minimum(tl.maximum(distance, -reach), reach))
    return tl.minimum(tl.maximum(found, 0), num_slots - 1)


@triton.jit
def table_rows(
    table,  # (R, heads, HEAD_SIZE) contiguous, of fewer than 2^31 elements
    own_slots,  # (W,)
    heads,
    head,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(W, WIDTH): of one head the rows at these slots."""
    e = tl.arange(0, WIDTH)
    places = ((own_slots * heads + head) * HEAD_SIZE)[:, None] + e[None, :]
    if HEAD_SIZE == WIDTH:
        return tl.load(table + places)
    return tl.load(table + places, mask=(e < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def sheared(tile, places, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) elements of a tile, at places that count its elements row by row.

    As one run of elements: a gather along an axis of two would be 8 times as many shuffles as this
    has accesses of shared memory.
    """
    flat = tl.reshape(tile, [tile.shape[0] * tile.shape[1]])
    return tl.reshape(tl.gather(flat, tl.reshape(places, [ROWS * COLUMNS]), 0), [ROWS, COLUMNS])


@triton.jit
def relative_scores(
    own,  # (BLOCK, WIDTH) queries, or keys
    other,  # the other of the two
    own_table,  # the table that the own rows are multiplied with, or None
    other_table,
    bias,  # (R, heads) fp32, or None
    own_slots,  # (2 * BLOCK,) of the tile's distances, rising
    place,  # (BLOCK, BLOCK) of (own, other): which of the distances is an element's
    heads,
    head,
    scale,
    bias_scale,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(BLOCK, BLOCK) fp32 scores of a tile of (own, other), distances in them."""
    scores = tl.dot(own, tl.trans(other), input_precision="ieee")
    if own_table is not None:
        rows = table_rows(own_table, own_slots, heads, head, HEAD_SIZE, WIDTH)
        product = tl.dot(own, tl.trans(rows), input_precision="ieee")
        own_row = tl.arange(0, BLOCK)[:, None] * (2 * BLOCK)
        scores += sheared(product, own_row + place, BLOCK, BLOCK)
    if other_table is not None:
        rows = table_rows(other_table, own_slots, heads, head, HEAD_SIZE, WIDTH)
        product = tl.dot(rows, tl.trans(other), input_precision="ieee")
        other_column = tl.arange(0, BLOCK)[None, :]
        scores += sheared(product, place * BLOCK + other_column, BLOCK, BLOCK)
    scores *= scale
    if bias is not None:
        of_distance = tl.load(bias + own_slots * heads + head) * bias_scale
        flat = tl.gather(of_distance, tl.reshape(place, [BLOCK * BLOCK]), 0)
        scores += tl.reshape(flat, [BLOCK, BLOCK])
    return scores


@triton.jit
def query_place(query_places, token, default):
    """Where a block's first query stands in its sequence; those after it follow one by one, or the
    forward kernel gives NaN.
    """
    if query_places is not None:
        default = tl.load(query_places + token)
    return default


RUNTIME = [
    "num_sequences",
    "num_steps",
    "num_tokens",
    "num_keys",
    "seed",
    "threshold",
    "reach",
    "num_slots",
]


@triton.jit(do_not_specialize=RUNTIME)
def relative_forward_kernel(
    q,  # (Tq, heads, HEAD_SIZE)
    k,  # (Tk, kv_heads, HEAD_SIZE)
    v,
    out,  # out (Tq, heads, HEAD_SIZE)
    lse,  # out (heads, Tq) fp32, to base 2
    cu_seqlens_q,  # (N + 1,) int32
    cu_seqlens_k,
    rows,  # (Tq,) int32, or None
    slots,  # (2 * reach + 1,) int32
    keys,  # (R, heads, HEAD_SIZE), or None
    queries,  # (R, heads, HEAD_SIZE), or None
    bias,  # (R, heads) fp32, or None
    query_places,  # (Tq,) int32, or None
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    scale,  # of the scores, times log2(e)
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
    """A block of queries of one head against the keys that any of them may read."""
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
        store_tile(out, nothing, out_token, out_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
        return
    at = query_place(query_places, first_q + first, first + num_k - num_q)
    if query_places is not None:
        there = tl.load(query_places + first_q + i, mask=in_q, other=0)
        apart = tl.sum((in_q & (there != at + a)).to(tl.int32)) > 0
    distance = a[:, None] - a[None, :] + BLOCK - 1
    q_tile = load_tile(q, q_token, q_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    if HAS_DROPOUT:
        streams = dropout.row_streams(seed, head, dropout.numbers(rows, first_q + i, in_q))[:, None]
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK):
        j = start + a
        in_k = j < num_k
        k_tile = load_tile(k, k_token, k_head, head, first_k + start, in_k, HEAD_SIZE, WIDTH)
        own_slots = slots_from(slots, at - start - (BLOCK - 1), reach, num_slots, 2 * BLOCK)
        scores = relative_scores(
            q_tile, k_tile, keys, queries, bias, own_slots, distance, heads, head, scale,
            1.4426950408889634,
            HEAD_SIZE, WIDTH, BLOCK,
        )  # fmt: skip
        scores = tl.where(in_k[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # So far nothing to read: any finite number keeps -inf - -inf away.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weights, axis=1)
        if HAS_DROPOUT:
            weights = weights * dropout.factors(streams, j[None, :], threshold, rescale)
        v_tile = load_tile(v, v_token, v_head, head, first_k + start, in_k, HEAD_SIZE, WIDTH)
        result = result * fade[:, None]
        result += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        highest = higher
    # Nothing to read gives 0; where there is something, but no score above -inf, 0 / 0 gives NaN.
    empty = num_k == 0
    total = tl.where(empty, 1.0, total)
    if query_places is not None:  # no tile has these distances: a result would be a wrong one
        total = tl.where(apart, float("nan"), total)
    result = result / total[:, None]
    store_tile(out, result, out_token, out_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    log_sum = tl.where(empty, float("inf"), highest + tl.log2(total))
    tl.store(lse + head.to(tl.int64) * num_tokens + first_q + i, log_sum, mask=in_q)


def places_of(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows: Tensor | None, relative: RelativePositions
) -> tuple[Tensor | None, ...]:
    """Sequences, rows, slots, tables and places of queries, as the kernels take them one after the
    other.
    """
    tables = [
        None if one is None else one.contiguous()
        for one in (relative.keys, relative.queries, relative.bias)
    ]
    return cu_seqlens_q, cu_seqlens_k, rows, relative.slots, *tables, relative.query_positions


def forward(
    q: Tensor,  # (Tq, heads, head_size), each head's row contiguous
    k: Tensor,  # (Tk, heads, head_size)
    v: Tensor,
    cu_seqlens_q: Tensor,  # (N + 1,) int32
    cu_seqlens_k: Tensor,
    rows: Tensor | None,  # (Tq,) int32
    scale: float,
    window_left: int,  # -1, as the next: relative positions have no window
    window_right: int,
    dropout_p: float,
    seed: int,
    relative: RelativePositions,
) -> tuple[Tensor, Tensor]:
    """The backend contract: out (Tq, heads, head_size), and lse (heads, Tq) fp32 for backward."""
    guard.require_gpu(q)
    if q.is_cpu:
        ragged.check_ends("cu_seqlens_q", cu_seqlens_q, q.shape[0])
        ragged.check_ends("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    for name, table in (("keys", relative.keys), ("queries", relative.queries)):
        if table is not None and table.numel() >= 2**31:
            raise ValueError(
                f"backend 'triton' takes relative.{name} of fewer than 2^31 elements, "
                f"got {tuple(table.shape)}"
            )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    num_sequences = cu_seqlens_q.shape[0] - 1
    if out.numel() == 0 or num_sequences == 0:
        return out, lse
    config = launch(q.shape[2], q.dtype, "forward", few_queries=has_few(q, num_sequences))
    launcher.launch(
        relative_forward_kernel,
        (q.shape[0] // config["BLOCK"] + num_sequences, q.shape[1]),
        (q, k, v, out, lse, *places_of(cu_seqlens_q, cu_seqlens_k, rows, relative)),
        (
            *strides(q, k, v, out),
            scale * 1.4426950408889634,
            *dropout.scalars(dropout_p, seed),
            num_sequences,
            (num_sequences - 1).bit_length(),
            q.shape[0],
            k.shape[0],
            relative.reach,
            relative.num_slots,
        ),
        launcher.constants(HEAD_SIZE=q.shape[2], HAS_DROPOUT=dropout_p > 0),
        config,
    )
    return out, lse


def variants(kernels: dict[Part, Any]) -> Iterator[Variant]:
    """Every head size class and dtype: DeBERTa's two tables with dropout, of some rows alone;
    MPNet's bias; and for a single query a sequence, which has a place of its own.
    """
    cases = [(torch.bfloat16, size) for size in (32, 64, 128)] + [(torch.float16, 64)]
    cases += [(torch.float32, size) for size in (32, 64)]
    for dtype, size in cases:
        name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        all_cases = ("tables_dropout_rows", "bias", "tables_one_query")
        for case in all_cases[:1] if dtype == torch.float16 else all_cases:
            has_one = case.endswith("one_query")
            left_out = ["bias", "bias_part"] if "tables" in case else ["keys", "queries"]
            # The gradients of the tables are computed one after the other.
            left_out += ["queries_part"] if "tables" in case else ["keys_part", "queries_part"]
            left_out += [] if case.endswith("rows") else ["rows"]
            left_out += [] if has_one else ["query_places"]
            for part, kernel in kernels.items():
                types = {argument: _type(argument, name) for argument in kernel.arg_names}
                constants: dict[str, Any] = {"HEAD_SIZE": size, "HAS_DROPOUT": "dropout" in case}
                configs = [
                    launch(size, dtype, part, few_queries=has_one, hip=hip) for hip in (False, True)
                ]
                yield Variant(
                    name=f"{kernel.__name__}_{name}_{size}_{case}",
                    kernel=kernel,
                    types=types,
                    config=configs[0],
                    hip_config=configs[1],
                    constants=constants | {one: None for one in left_out if one in types},
                    # What Triton finds at a launch: aligned tensors, and strides of multiples of
                    # 16.
                    multiples=[
                        a
                        for a in types
                        if types[a].startswith("*") or a.endswith(("_token", "_head"))
                    ],
                )


def shipped() -> Iterator[Variant]:
    return variants({"forward": relative_forward_kernel})


def _type(argument: str, dtype: str) -> str:
    if argument in ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv", "keys", "queries"):
        return f"*{dtype}"
    if argument in ("lse", "along", "bias") or argument.endswith("_part"):
        return "*fp32"
    if argument.startswith("cu_seqlens") or argument in ("rows", "slots", "query_places"):
        return "*i32"
    return "fp32" if argument in ("scale", "log2_scale", "rescale") else "i32"
