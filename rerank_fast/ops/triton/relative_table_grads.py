"""The gradients of the tables of relative positions in Triton: one launch over the tiles of scores,
one over what it leaves.

Tiles in which a block of queries begins m * BLOCK places behind a block of keys hold the same
2 * BLOCK - 1 distances. One program takes all of these tiles of a head in a part of the sequences,
and leaves what each distance's rows get from them; those with m from where all distances have the
slot of reach on have one program. Then each row of a table takes what was left for the distances
that have its slot. Sums are in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.relative_positions import RelativePositions
from rerank_fast.ops.triton import dropout, launcher
from rerank_fast.ops.triton.attention_tiles import has_few, load_tile, strides
from rerank_fast.ops.triton.grid import next_power_of_2
from rerank_fast.ops.triton.relative_attention import (
    RUNTIME,
    launch,
    places_of,
    query_place,
    relative_scores,
    sheared,
    slots_from,
    variants,
)
from rerank_fast.ops.triton.variant import Variant

# Parts of the sequences, each with programs of its own: of tables of rows, whose parts take memory,
# and of the bias.
_MOST_CHUNKS = {"rows": 4, "bias": 16}


@triton.jit
def _sequence(cu_seqlens, n, num_sequences, num_rows):
    """First row and number of rows of sequence n; whether it lies in the rows, and the first and
    the last reach to their ends. Where it does not it has none.
    """
    token = tl.load(cu_seqlens + n)
    end = tl.load(cu_seqlens + n + 1)
    fits = (token >= 0) & (token <= end) & (end <= num_rows)
    fits = fits & ((n != 0) | (token == 0)) & ((n != num_sequences - 1) | (end == num_rows))
    return token, tl.where(fits, end - token, 0), fits


@triton.jit
def _store_part(part, acc, head, heads, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """(2 * BLOCK, WIDTH) to a program's own place among the parts, one of a head behind the
    other.
    """
    own = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * heads + head
    e = tl.arange(0, WIDTH)
    places = tl.arange(0, acc.shape[0])[:, None] * HEAD_SIZE + e[None, :]
    there = tl.broadcast_to((e < HEAD_SIZE)[None, :], acc.shape)
    tl.store(part + own * acc.shape[0] * HEAD_SIZE + places, acc, mask=there)


@triton.jit(do_not_specialize=[*RUNTIME, "chunk", "far"])
def relative_table_grad_kernel(
    q,
    k,
    v,
    lse,
    along,
    grad_out,
    keys_part,  # out (chunks, 2 * far + 1, heads, 2 * BLOCK, HEAD_SIZE) fp32, or None
    queries_part,
    bias_part,  # out (chunks, 2 * far + 1, heads, 2 * BLOCK, 1) fp32, or None
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
    scale,
    log2_scale,
    seed,
    threshold,
    rescale,
    num_sequences,
    num_tokens,
    num_keys,
    reach,
    num_slots,
    chunk,  # sequences of a program
    far,  # the m from which on all distances have one slot
    HEAD_SIZE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What the distances of one m, in one head and some sequences, leave for the tables' rows."""
    m = tl.program_id(0) - far
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    a = tl.arange(0, BLOCK)
    w = tl.arange(0, 2 * BLOCK)
    d_keys = tl.zeros([2 * BLOCK, WIDTH], tl.float32)
    d_queries = tl.zeros([2 * BLOCK, WIDTH], tl.float32)
    d_bias = tl.zeros([2 * BLOCK], tl.float32)
    all_fit = m == m
    begin = tl.program_id(2) * chunk
    for n in range(begin, tl.minimum(begin + chunk, num_sequences)):
        first_q, num_q, q_fits = _sequence(cu_seqlens_q, n, num_sequences, num_tokens)
        first_k, num_k, k_fits = _sequence(cu_seqlens_k, n, num_sequences, num_keys)
        all_fit = all_fit & q_fits & k_fits
        num_q = tl.where(k_fits, num_q, 0)
        at = num_k - num_q
        if num_q > 0:
            at = query_place(query_places, first_q, at)
        least = m
        most = m
        if m == far:
            most = tl.maximum(m, (at + num_q) // BLOCK + 1)
        if m == -far:
            least = tl.minimum(m, -((num_k - at) // BLOCK + 1))
        for step in range(least, most + 1):
            # Of the keys that a block of queries meets at this distance some lie in the sequence.
            low = tl.maximum(step * BLOCK - at, 0) // BLOCK * BLOCK
            for start in range(low, tl.minimum(num_q, num_k + step * BLOCK - at), BLOCK):
                i = start + a
                in_q = i < num_q
                key = at + start - step * BLOCK
                j = key + a
                in_k = (j >= 0) & (j < num_k)
                q_tile = load_tile(
                    q, q_token, q_head, head, first_q + start, in_q, HEAD_SIZE, WIDTH
                )
                k_tile = load_tile(k, k_token, k_head, head, first_k + key, in_k, HEAD_SIZE, WIDTH)
                own_slots = slots_from(
                    slots, step * BLOCK - (BLOCK - 1), reach, num_slots, 2 * BLOCK
                )
                scores = relative_scores(
                    q_tile, k_tile, keys, queries, bias, own_slots,
                    a[:, None] - a[None, :] + BLOCK - 1, heads, head, log2_scale,
                    1.4426950408889634, HEAD_SIZE, WIDTH, BLOCK,
                )  # fmt: skip
                grad_tile = load_tile(
                    grad_out, grad_token, grad_head, head, first_q + start, in_q, HEAD_SIZE, WIDTH
                )
                v_tile = load_tile(v, v_token, v_head, head, first_k + key, in_k, HEAD_SIZE, WIDTH)
                flat = head.to(tl.int64) * num_tokens + first_q + i
                lse_i = tl.load(lse + flat, mask=in_q, other=float("inf"))[:, None]
                along_i = tl.load(along + flat, mask=in_q, other=0.0)[:, None]
                upstream = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
                if HAS_DROPOUT:
                    numbers = dropout.numbers(rows, first_q + i, in_q)
                    streams = dropout.row_streams(seed, head, numbers)[:, None]
                    upstream *= dropout.factors(streams, j[None, :], threshold, rescale)
                weights = tl.where(in_k[None, :], tl.exp2(scores - lse_i), 0.0)
                d_scores = weights * (upstream - along_i)
                if (keys_part is not None) or (bias_part is not None):
                    b = a[None, :] - w[:, None] + BLOCK - 1
                    there = (b >= 0) & (b < BLOCK)
                    places = tl.where(there, a[None, :] * BLOCK + b, 0)
                    moved = tl.where(there, sheared(d_scores, places, 2 * BLOCK, BLOCK), 0.0)
                    if keys_part is not None:
                        d_keys += tl.dot(moved.to(q_tile.dtype), q_tile, input_precision="ieee")
                    if bias_part is not None:
                        d_bias += tl.sum(moved, axis=1)
                if queries_part is not None:
                    query = w[:, None] + a[None, :] - (BLOCK - 1)
                    there = (query >= 0) & (query < BLOCK)
                    places = tl.where(there, query * BLOCK + a[None, :], 0)
                    moved = tl.where(there, sheared(d_scores, places, 2 * BLOCK, BLOCK), 0.0)
                    d_queries += tl.dot(moved.to(k_tile.dtype), k_tile, input_precision="ieee")
    factor = tl.where(all_fit, 1.0, float("nan"))
    if keys_part is not None:
        _store_part(keys_part, d_keys * (factor * scale), head, heads, HEAD_SIZE, WIDTH)
    if queries_part is not None:
        _store_part(queries_part, d_queries * (factor * scale), head, heads, HEAD_SIZE, WIDTH)
    if bias_part is not None:
        _store_part(bias_part, (d_bias * factor)[:, None], head, heads, 1, 1)


@triton.jit(do_not_specialize=["reach", "far", "num_chunks"])
def relative_table_sum_kernel(
    part,  # (chunks, 2 * far + 1, heads, 2 * BLOCK, HEAD_SIZE) fp32
    table,  # out (R, heads, HEAD_SIZE)
    slots,
    reach,
    far,
    num_chunks,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row of a table: the sum of what was left for the distances that have its slot."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    w = tl.arange(0, 2 * BLOCK)
    e = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for m in range(0, 2 * far + 1):
        distance = (m - far) * BLOCK + w - (BLOCK - 1)
        own = tl.load(slots + reach + tl.minimum(tl.maximum(distance, -reach), reach)) == slot
        if tl.sum(own.to(tl.int32)) > 0:
            there = own[:, None] & (e < HEAD_SIZE)[None, :]
            for chunk in range(num_chunks):
                first = ((chunk * (2 * far + 1) + m).to(tl.int64) * heads + head) * 2 * BLOCK
                places = first * HEAD_SIZE + w[:, None] * HEAD_SIZE + e[None, :]
                total += tl.sum(tl.load(part + places, mask=there, other=0.0), axis=0)
    row = (slot.to(tl.int64) * heads + head) * HEAD_SIZE
    tl.store(table + row + e, total.to(table.dtype.element_ty), mask=e < HEAD_SIZE)


def table_grads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    along: Tensor,  # (heads, Tq) fp32, as the queries' kernel left it
    grad_out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    relative: RelativePositions,
    scale: float,
    dropout_p: float,
    seed: int,
) -> list[Tensor | None]:
    """The gradients of relative.keys, queries and bias; None for what there is not.

    One after the other: together they would not stay in registers, and one needs no memory that
    another has. What the programs leave for a table of rows takes 16 bytes for each of
    chunks * (reach + BLOCK) * heads * head_size.
    """
    num_sequences = cu_seqlens_q.shape[0] - 1
    heads, head_size = q.shape[1:]
    config = launch(head_size, q.dtype, "tables", few_queries=has_few(q, num_sequences))
    block = config["BLOCK"]
    places = places_of(cu_seqlens_q, cu_seqlens_k, rows, relative)
    far = -(-(relative.reach + block - 1) // block)
    found: list[Tensor | None] = []
    for place, table in enumerate((relative.keys, relative.queries, relative.bias)):
        if table is None:
            found.append(None)
            continue
        grad = torch.empty(table.shape, dtype=table.dtype, device=table.device)
        found.append(grad)
        if q.shape[0] == 0 or k.shape[0] == 0:
            grad.zero_()
            continue
        most = _MOST_CHUNKS["bias" if place == 2 else "rows"]
        chunk = -(-num_sequences // min(num_sequences, most))
        num_chunks = -(-num_sequences // chunk)
        width = 1 if place == 2 else head_size
        shape = (num_chunks, 2 * far + 1, heads, 2 * block, width)
        part = torch.empty(shape, dtype=torch.float32, device=q.device)
        parts = [part if own == place else None for own in range(3)]
        launcher.launch(
            relative_table_grad_kernel,
            (2 * far + 1, heads, num_chunks),
            (q, k, v, lse, along, grad_out, *parts, *places),
            (
                *strides(q, k, v, grad_out),
                scale,
                scale * 1.4426950408889634,
                *dropout.scalars(dropout_p, seed),
                num_sequences,
                q.shape[0],
                k.shape[0],
                relative.reach,
                relative.num_slots,
                chunk,
                far,
            ),
            launcher.constants(HEAD_SIZE=head_size, HAS_DROPOUT=dropout_p > 0),
            config,
        )
        launcher.launch(
            relative_table_sum_kernel,
            (relative.num_slots, heads),
            (part, grad, relative.slots),
            (relative.reach, far, num_chunks),
            launcher.constants(
                HEAD_SIZE=width, BLOCK=block, WIDTH=next_power_of_2(width), num_warps=4
            ),
        )
    return found


def shipped() -> Iterator[Variant]:
    yield from variants({"tables": relative_table_grad_kernel})
    for name, size in (("bf16", 64), ("fp32", 1)):  # of DeBERTa's rows and of a bias
        constants = {"HEAD_SIZE": size, "BLOCK": 32, "WIDTH": size}
        types = {"part": "*fp32", "table": f"*{name}", "slots": "*i32"}
        yield Variant(
            name=f"relative_table_sum_kernel_{name}_{size}",
            kernel=relative_table_sum_kernel,
            types=types | dict.fromkeys(("reach", "far", "num_chunks"), "i32"),
            config=constants | {"num_warps": 4},
        )
