"""BERT's embeddings in Triton: words, positions and types gathered, summed, normed and dropped out
in one pass.

Backward leaves the gradient of the sum and sums over a few rows of those of the norm's vectors and
of the types; another launch adds up the rows of each word and position in the order that the host
gives: no atomics.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.registry import declare
from rerank_fast.ops.triton import dropout, guard, launcher
from rerank_fast.ops.triton.grid import cdiv
from rerank_fast.ops.triton.residual_norm import ROWS, launch, programs
from rerank_fast.ops.triton.variant import Variant

MOST_TYPES = 2
SEGMENTS = launcher.Config({"ROWS": 32, "COLUMNS": 128, "num_warps": 4, "enable_fp_fusion": True})


@functools.cache
def _launch_grads(width: int, hip: bool = guard.HIP) -> launcher.Config:
    """Without the limit it takes 71 registers, and fewer than half of the warps run."""
    return launcher.Config(guard.for_vendor(launch(width, hip) | {"maxnreg": 64}, hip))


@triton.jit
def _embedded(words, positions, types, ids, num_tokens, row, e, there, width):
    """The sum of a token's rows of the tables; ids are (3, T): of words, positions and types."""
    word = tl.load(ids + row).to(tl.int64)
    position = tl.load(ids + num_tokens + row).to(tl.int64)
    total = tl.load(words + word * width + e, mask=there, other=0.0).to(tl.float32)
    if types is not None:
        kind = tl.load(ids + 2 * num_tokens + row).to(tl.int64)
        total += tl.load(types + kind * width + e, mask=there, other=0.0).to(tl.float32)
    return total + tl.load(positions + position * width + e, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _kept(rows, row, e, seed, threshold, rescale):
    """The factors of a row's dropout."""
    number = dropout.numbers(rows, row, True)
    return dropout.factors(
        dropout.row_streams(seed, tl.full([], 0, tl.uint32), number), e, threshold, rescale
    )


@triton.jit(do_not_specialize=["num_tokens", "seed", "threshold"])
def embed_norm_kernel(
    words,  # (U, width) of any dtype
    positions,  # (P, width)
    types,  # (1 or 2, width), or None
    ids,  # (3, T) int32
    weight,  # (width,) fp32
    bias,
    rows,  # (T,) int32: the tokens' numbers in the dropout; or None
    y,  # out (T, width) fp32
    narrow,  # out (T, width) in 16 bits, or None
    mean,  # out (T,) fp32
    rstd,
    num_tokens,
    width,
    eps,
    seed,
    threshold,
    rescale,
    HAS_DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, WIDTH)
    there = e < width
    total = _embedded(words, positions, types, ids, num_tokens, row, e, there, width)
    middle = tl.sum(total, axis=0) / width
    centered = tl.where(there, total - middle, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / width + eps)
    tl.store(mean + row, middle)
    tl.store(rstd + row, scale)
    result = centered * scale * tl.load(weight + e, mask=there, other=0.0)
    result += tl.load(bias + e, mask=there, other=0.0)
    if HAS_DROPOUT:
        result *= _kept(rows, row, e, seed, threshold, rescale)
    tl.store(y + row * width + e, result, mask=there)
    if narrow is not None:
        tl.store(narrow + row * width + e, result.to(narrow.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_tokens", "seed", "threshold"])
def embed_norm_grad_kernel(
    words,
    positions,
    types,
    ids,
    weight,
    mean,
    rstd,
    rows,
    grad_y,  # (T, width) fp32
    grad_narrow,  # (T, width) in 16 bits, or None
    d_total,  # out (T, width) fp32: of the sum of the rows of the tables
    sums,  # out (programs, (2 + NUM_TYPES) x width) fp32: of weight, bias and types
    num_tokens,
    width,
    seed,
    threshold,
    rescale,
    NUM_TYPES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, WIDTH)
    there = e < width
    gain = tl.load(weight + e, mask=there, other=0.0)
    weight_sum = tl.zeros([WIDTH], tl.float32)
    bias_sum = tl.zeros([WIDTH], tl.float32)
    first_sum = tl.zeros([WIDTH], tl.float32)
    second_sum = tl.zeros([WIDTH], tl.float32)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, num_tokens)):
        total = _embedded(words, positions, types, ids, num_tokens, row, e, there, width)
        scale = tl.load(rstd + row)
        unit = tl.where(there, (total - tl.load(mean + row)) * scale, 0.0)
        grad = tl.load(grad_y + row * width + e, mask=there, other=0.0)
        if grad_narrow is not None:
            grad += tl.load(grad_narrow + row * width + e, mask=there, other=0.0).to(tl.float32)
        if HAS_DROPOUT:
            grad *= _kept(rows, tl.full([], 0, tl.int64) + row, e, seed, threshold, rescale)
        weight_sum += grad * unit
        bias_sum += grad
        weighted = grad * gain
        along = tl.sum(weighted * unit, axis=0) / width
        result = scale * (weighted - tl.sum(weighted, axis=0) / width - unit * along)
        tl.store(d_total + row * width + e, result, mask=there)
        if NUM_TYPES > 0:
            kind = tl.load(ids + 2 * num_tokens + row)
            first_sum += tl.where(kind == 0, result, 0.0)
            second_sum += tl.where(kind == 1, result, 0.0)
    own = sums + program * (2 + NUM_TYPES) * width + e
    tl.store(own, weight_sum, mask=there)
    tl.store(own + width, bias_sum, mask=there)
    if NUM_TYPES > 0:
        tl.store(own + 2 * width, first_sum, mask=there)
    if NUM_TYPES > 1:
        tl.store(own + 3 * width, second_sum, mask=there)


@triton.jit
def segment_sums_kernel(
    x,  # (T, width) fp32
    order,  # (M,) int32 rows of x
    starts,  # (S + 1,) int32: where each segment of the order begins
    out,  # out (S, width) fp32
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(starts + segment)
    end = tl.load(starts + segment + 1)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        there = (place < end)[:, None] & (e < width)[None, :]
        total += tl.load(x + row[:, None] * width + e[None, :], mask=there, other=0.0)
    tl.store(out + segment * width + e, tl.sum(total, axis=0), mask=e < width)


@declare("embed_norm")
def embed_norm(
    words: Tensor,
    positions: Tensor,
    types: Tensor | None,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor | None,
    dtype: torch.dtype,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dropout(LayerNorm(words + types + positions)) of T tokens, without a graph.

    Args:
        words: (U, H) rows of the word embeddings, contiguous as all tensors here.
        positions: (P, H) table.
        types: (1 or 2, H) table, or None.
        ids: (3, T) int32 rows in words, positions and types.
        weight: (H,) fp32 of the norm.
        bias: (H,) fp32.
        rows: (T,) int32 numbers of the tokens in the dropout; None: 0 to T - 1.
        dtype: of a second result in 16 bits; it is empty for fp32.
        eps: of the norm.
        dropout_p: share that is dropped.
        seed: chooses which.

    Returns:
        (T, H) fp32, the same in dtype, (T,) fp32 mean and reciprocal of the deviation.
    """
    num_tokens, width = ids.shape[1], words.shape[1]
    y = weight.new_empty(num_tokens, width)
    narrow = weight.new_empty(0 if dtype == torch.float32 else num_tokens, width, dtype=dtype)
    mean, rstd = weight.new_empty(num_tokens), weight.new_empty(num_tokens)
    if num_tokens and not words.is_meta:
        given = (words, positions, types, ids, weight, bias, rows)
        launcher.launch(
            embed_norm_kernel,
            (num_tokens,),
            (*given, y, narrow if len(narrow) else None, mean, rstd),
            (num_tokens, width, eps, *dropout.scalars(dropout_p, seed)),
            launcher.constants(HAS_DROPOUT=dropout_p > 0),
            launch(width),
        )
    return y, narrow, mean, rstd


@declare("embed_norm_grads")
def embed_norm_grads(
    words: Tensor,
    positions: Tensor,
    types: Tensor | None,
    ids: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: Tensor | None,
    grad_y: Tensor,
    grad_narrow: Tensor | None,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """(T, H) fp32 the gradient of the sum, and rows of sums of those of weight, bias and each of
    the types.
    """
    num_tokens, width = grad_y.shape
    num_types = 0 if types is None else types.shape[0]
    d_total = torch.empty_like(grad_y)
    sums = grad_y.new_empty(programs(num_tokens), (2 + num_types) * width)
    if num_tokens and not words.is_meta:
        given = (words, positions, types, ids, weight, mean, rstd, rows)
        launcher.launch(
            embed_norm_grad_kernel,
            (sums.shape[0],),
            (*given, grad_y, grad_narrow, d_total, sums),
            (num_tokens, width, *dropout.scalars(dropout_p, seed)),
            launcher.constants(NUM_TYPES=num_types, HAS_DROPOUT=dropout_p > 0, ROWS=ROWS),
            _launch_grads(width),
        )
    return d_total, sums


@declare("segment_sums")
def segment_sums(x: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """(S, H) sums of rows of x (T, H) fp32: of segment s those at order[starts[s]:starts[s + 1]],
    all int32.
    """
    num_segments, width = starts.shape[0] - 1, x.shape[1]
    out = x.new_empty(num_segments, width)
    if out.numel() and not x.is_meta:
        grid = num_segments, cdiv(width, SEGMENTS["COLUMNS"])
        launcher.launch(segment_sums_kernel, grid, (x, order, starts, out), (width,), SEGMENTS)
    return out


def shipped() -> Iterator[Variant]:
    for name in ("bf16", "fp16", "fp32"):
        for width in (384, 1024):
            for kernel in (embed_norm_kernel, embed_norm_grad_kernel):
                types = {argument: _type(argument, name) for argument in kernel.arg_names}
                constants: dict[str, Any] = {"HAS_DROPOUT": True, "rows": None}
                configured = launch
                if kernel is embed_norm_grad_kernel:
                    configured = _launch_grads
                    constants |= {"NUM_TYPES": MOST_TYPES, "ROWS": ROWS}
                if name == "fp32":
                    constants["narrow" if kernel is embed_norm_kernel else "grad_narrow"] = None
                yield Variant(
                    f"{kernel.__name__}-{name}_{width}",
                    kernel,
                    types,
                    configured(width, hip=False),
                    constants,
                    configured(width, hip=True),
                    multiples=[a for a in types if types[a].startswith("*") or a == "width"],
                )
    types = {"x": "*fp32", "order": "*i32", "starts": "*i32", "out": "*fp32", "width": "i32"}
    yield Variant("segment_sums", segment_sums_kernel, types, SEGMENTS, multiples=list(types))


def _type(argument: str, dtype: str) -> str:
    if argument in ("narrow", "grad_narrow"):
        return f"*{dtype}"
    if argument in ("eps", "rescale"):
        return "fp32"
    if argument in ("ids", "rows"):
        return "*i32"
    return "i32" if argument in ("num_tokens", "width", "seed", "threshold") else "*fp32"
