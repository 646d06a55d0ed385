"""The score head's gradients in Triton: two launches, whatever the shape.

The first computes the dense product again and gives the gradient of the dense layer's result, the
second one that of its inputs and of the weights. Each tile is summed by one program in a fixed
order: no atomics, and the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.triton import autotune, dropout, guard, launcher, score_head
from rerank_fast.ops.triton.grid import cdiv
from rerank_fast.ops.triton.score_head import (
    IN_STREAM,
    STREAM,
    activate,
    dense_tile,
    load_tile,
    load_x,
    places,
    span,
)
from rerank_fast.ops.triton.variant import Variant

# Rows and columns of a tile, and how much of its sum is taken at once.
LAUNCH = launcher.Config(
    {
        "ROWS": 32,
        "COLUMNS": 32,
        "INNER": 32,
        "num_warps": 8,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }
)
LAUNCH_FP32 = launcher.Config(LAUNCH | {"INNER": 16})
# Else some more registers, and half the warps; with a second stage two would be spilled on sm_120.
LAUNCH_FP32_DROPOUT = launcher.Config(
    guard.for_vendor(LAUNCH_FP32 | {"maxnreg": 64, "num_stages": 1})
)
CASE = ("D", "H", "DROP_IN")
# What tuning tries beside them.
AROUND: tuple[dict[str, Any], ...] = (
    {"num_warps": 4},
    {"COLUMNS": 64},
    {"ROWS": 64},
    {"INNER": 64},
)


@triton.jit
def _store_tile(matrix, stride, tile, row, in_rows, column, in_columns):
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(matrix + place, tile, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=score_head.NOT_SPECIALIZED)
def dense_grad_kernel(
    grad_scores,  # (N,) fp32
    hidden,  # (T, H)
    index,  # (N,) or None
    dense_weight,  # (D, H)
    dense_bias,  # (D,) or None
    out_weight,  # (D,)
    d_dense,  # out (N, D) in hidden's dtype: the gradient of the dense layer's result
    bias_parts,  # out (row blocks, D) fp32: each block's share of the gradient of dense_bias
    out_parts,  # out (row blocks, D) fp32: of out_weight
    stride,
    num_hidden,
    n,
    D,
    H,
    seed,
    threshold,
    rescale,
    threshold_in,
    rescale_in,
    dot_dtype: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    DROP_IN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile of d_dense, the product computed again, and its rows' share of the vectors'
    gradients.
    """
    source = (hidden, stride, num_hidden, index, seed, threshold_in, rescale_in)
    row, in_rows = span(tl.program_id(0) * ROWS, n, ROWS)
    out, in_out = span(tl.program_id(1) * COLUMNS, D, COLUMNS)
    dense = dense_tile(
        source, dense_weight, dense_bias, row, in_rows, out, in_out, H, dot_dtype, DROP_IN, INNER
    )
    active, slope = activate(dense, ACTIVATION)
    upstream = tl.load(grad_scores + row, mask=in_rows, other=0.0)
    if index is not None:  # where it names no row the score was NaN, and so are the gradients
        _, there = places(source, row, in_rows)
        upstream = tl.where(there | (in_rows == 0), upstream, float("nan"))
    w = tl.load(out_weight + out, mask=in_out, other=0.0).to(tl.float32)[None, :]
    kept = tl.zeros([ROWS, COLUMNS], tl.float32) + upstream[:, None]
    if DROP:
        kept *= dropout.tile_factors(seed, STREAM, row, out, threshold, rescale)
    grad = kept * w * slope
    _store_tile(d_dense, D, grad, row, in_rows, out, in_out)
    part = tl.program_id(0).to(tl.int64) * D + out
    tl.store(bias_parts + part, tl.sum(grad, axis=0), mask=in_out)
    tl.store(out_parts + part, tl.sum(kept * active, axis=0), mask=in_out)


@triton.jit
def _hidden_tile(
    tile,
    source,
    dense_weight,
    d_dense,
    d_hidden,
    n,
    D,
    H,
    dot_dtype: tl.constexpr,
    DROP_IN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """d_dense @ dense_weight, dropped out, to the rows that were read."""
    _, _, _, _, seed, threshold, rescale = source
    across = tl.cdiv(H, COLUMNS)
    row, in_rows = span(tile // across * ROWS, n, ROWS)
    e, in_e = span(tile % across * COLUMNS, H, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, D, INNER):
        out, in_out = span(first, D, INNER)
        grad = load_tile(d_dense, D, row, in_rows, out, in_out)
        w = load_tile(dense_weight, H, out, in_out, e, in_e)
        total = tl.dot(grad.to(dot_dtype), w.to(dot_dtype), total, input_precision="ieee")
    if DROP_IN:
        total *= dropout.tile_factors(seed, IN_STREAM, row, e, threshold, rescale)
    target, there = places(source, row, in_rows)
    _store_tile(d_hidden, H, total, target, there, e, in_e)


@triton.jit
def _weight_tile(
    tile,
    source,
    d_dense,
    d_dense_weight,
    n,
    D,
    H,
    dot_dtype: tl.constexpr,
    DROP_IN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """d_dense^T @ the rows that were read."""
    across = tl.cdiv(H, COLUMNS)
    out, in_out = span(tile // across * ROWS, D, ROWS)
    e, in_e = span(tile % across * COLUMNS, H, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n, INNER):
        row, in_rows = span(first, n, INNER)
        grad = tl.trans(load_tile(d_dense, D, row, in_rows, out, in_out))
        x = load_x(source, row, in_rows, e, in_e, DROP_IN)
        total = tl.dot(grad.to(dot_dtype), x.to(dot_dtype), total, input_precision="ieee")
    _store_tile(d_dense_weight, H, total, out, in_out, e, in_e)


@triton.jit
def _sum_parts(parts, num_parts, out, in_out, D, to, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Some rows at a time: one after the other each would wait for memory."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, num_parts, ROWS):
        part, in_parts = span(first, num_parts, ROWS)
        total += load_tile(parts, D, part, in_parts, out, in_out)
    tl.store(to + out, tl.sum(total, axis=0), mask=in_out)


@triton.jit(do_not_specialize=[*score_head.NOT_SPECIALIZED, "num_parts"])
def grads_kernel(
    grad_scores,  # (N,) fp32
    hidden,  # (T, H)
    index,  # (N,) or None
    dense_weight,  # (D, H)
    d_dense,  # (N, D)
    bias_parts,  # (num_parts, D) fp32
    out_parts,  # (num_parts, D) fp32
    d_hidden,  # out (T, H), zeros where index is given, or None
    d_dense_weight,  # out (D, H) or None
    d_dense_bias,  # out (D,) or None
    d_out_weight,  # out (D,) or None
    d_out_bias,  # out (1,) or None
    stride,
    num_hidden,
    n,
    D,
    H,
    num_parts,
    seed,
    threshold_in,
    rescale_in,
    dot_dtype: tl.constexpr,
    DROP_IN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """First the tiles of d_hidden, then those of d_dense_weight, then blocks of the vectors: a
    program each.
    """
    source = (hidden, stride, num_hidden, index, seed, threshold_in, rescale_in)
    tile = tl.program_id(0)
    across = tl.cdiv(H, COLUMNS)
    hidden_tiles = 0
    if d_hidden is not None:
        hidden_tiles = tl.cdiv(n, ROWS) * across
        if tile < hidden_tiles:
            _hidden_tile(
                tile,
                source,
                dense_weight,
                d_dense,
                d_hidden,
                n,
                D,
                H,
                dot_dtype,
                DROP_IN,
                ROWS,
                COLUMNS,
                INNER,
            )
    tile -= hidden_tiles
    weight_tiles = 0
    if d_dense_weight is not None:
        weight_tiles = tl.cdiv(D, ROWS) * across
        if (tile >= 0) & (tile < weight_tiles):
            _weight_tile(
                tile,
                source,
                d_dense,
                d_dense_weight,
                n,
                D,
                H,
                dot_dtype,
                DROP_IN,
                ROWS,
                COLUMNS,
                INNER,
            )
    tile -= weight_tiles
    if tile >= 0:
        out, in_out = span(tile * COLUMNS, D, COLUMNS)
        if d_dense_bias is not None:
            _sum_parts(bias_parts, num_parts, out, in_out, D, d_dense_bias, ROWS, COLUMNS)
        if d_out_weight is not None:
            _sum_parts(out_parts, num_parts, out, in_out, D, d_out_weight, ROWS, COLUMNS)
        if d_out_bias is not None and tile == 0:
            total = tl.zeros([COLUMNS], tl.float32)
            for first in range(0, n, COLUMNS):
                row = first + tl.arange(0, COLUMNS)
                total += tl.load(grad_scores + row, mask=row < n, other=0.0)
            tl.store(d_out_bias + tl.arange(0, 1), tl.sum(total, axis=0)[None])


def backward(
    grad_scores: Tensor,  # (N,) fp32
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    out_weight: Tensor,
    kept_dense: Tensor,  # empty: it is computed again
    wants: list[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of hidden, dense_weight, dense_bias, out_weight and
    out_bias.

    One that is not wanted is empty.
    """
    guard.require_gpu(hidden)
    index = None if index is None else index.contiguous()
    n = grad_scores.shape[0]
    size, width = dense_weight.shape
    seed, after, before, flags = score_head.split(hidden, options)
    shapes = (hidden.shape, dense_weight.shape, (size,), out_weight.shape, (1,))
    grads: list[Tensor | None] = [
        hidden.new_empty(shape) if want else None for shape, want in zip(shapes, wants, strict=True)
    ]
    if n == 0 or index is not None:  # rows that no kernel writes
        for grad in grads[: 5 if n == 0 else 1]:
            if grad is not None:
                grad.zero_()
    if n and any(wants):
        wide = hidden.dtype == torch.float32
        launch = score_head.LAUNCH_FP32 if wide else score_head.LAUNCH
        wide_launch = LAUNCH_FP32_DROPOUT if flags["DROP_IN"] else LAUNCH_FP32
        second = wide_launch if wide else LAUNCH
        num_parts = cdiv(n, launch["ROWS"])
        d_dense = hidden.new_empty(n, size)
        parts = torch.empty(2, num_parts, size, dtype=torch.float32, device=hidden.device)
        dense_grad, launch = autotune.choose(
            dense_grad_kernel, launch, score_head.AROUND, score_head.CASE
        )
        all_grads, second = autotune.choose(grads_kernel, second, AROUND, CASE)

        def programs(blocks: dict[str, Any]) -> tuple[int]:
            across = cdiv(width, blocks["COLUMNS"])
            return (
                wants[0] * cdiv(n, blocks["ROWS"]) * across
                + wants[1] * cdiv(size, blocks["ROWS"]) * across
                + any(wants[2:]) * cdiv(size, blocks["COLUMNS"]),
            )

        rows = (hidden.stride(0), hidden.shape[0], n, size, width)
        launcher.launch(
            dense_grad,
            lambda blocks: (num_parts, cdiv(size, blocks["COLUMNS"])),
            (grad_scores, hidden, index, dense_weight, dense_bias, out_weight, d_dense, *parts),
            (*rows, seed, *after, *before),
            flags,
            launch,
        )
        launcher.launch(
            all_grads,
            programs,
            (grad_scores, hidden, index, dense_weight, d_dense, *parts, *grads),
            (*rows, num_parts, seed, *before),
            launcher.constants(dot_dtype=flags["dot_dtype"], DROP_IN=flags["DROP_IN"]),
            second,
        )
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


def shipped() -> Iterator[Variant]:
    yield from score_head.variants(
        "dense_grad", dense_grad_kernel, score_head.LAUNCH, score_head.LAUNCH_FP32
    )
    yield from score_head.variants("grads", grads_kernel, LAUNCH, LAUNCH_FP32, LAUNCH_FP32_DROPOUT)
