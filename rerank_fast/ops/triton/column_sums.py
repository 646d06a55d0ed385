"""Sums over the rows of up to three matrices in one launch: what kernels left of vectors'
gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.registry import declare
from rerank_fast.ops.triton import launcher
from rerank_fast.ops.triton.grid import cdiv
from rerank_fast.ops.triton.variant import Variant

LAUNCH = launcher.Config({"ROWS": 128, "COLUMNS": 32, "num_warps": 8, "enable_fp_fusion": True})


@triton.jit
def _sum_columns(matrix, num_rows, width, block, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    e = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < num_rows)[:, None] & (e < width)[None, :]
        total += tl.load(
            matrix + row.to(tl.int64)[:, None] * width + e[None, :], mask=there, other=0.0
        )
    tl.store(out + e, tl.sum(total, axis=0), mask=e < width)


@triton.jit(do_not_specialize=["a_rows", "b_rows", "c_rows"])
def column_sums_kernel(
    a,  # (a_rows, a_width) fp32, and so the others
    b,
    c,
    out,  # out (a_width + b_width + c_width,) fp32
    a_rows,
    b_rows,
    c_rows,
    a_width,
    b_width,
    c_width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of columns of one of them."""
    block = tl.program_id(0)
    a_blocks = tl.cdiv(a_width, COLUMNS)
    b_blocks = a_blocks + tl.cdiv(b_width, COLUMNS)
    if block < a_blocks:
        _sum_columns(a, a_rows, a_width, block, out, ROWS, COLUMNS)
    elif block < b_blocks:
        _sum_columns(b, b_rows, b_width, block - a_blocks, out + a_width, ROWS, COLUMNS)
    else:
        _sum_columns(c, c_rows, c_width, block - b_blocks, out + a_width + b_width, ROWS, COLUMNS)


@declare("column_sums")
def column_sums(a: Tensor, b: Tensor | None, c: Tensor | None) -> Tensor:
    """The sums over the rows of contiguous fp32 matrices, one after the other."""
    matrices = (a, b, c)
    rows = [0 if one is None else one.shape[0] for one in matrices]
    widths = [0 if one is None else one.shape[1] for one in matrices]
    out = a.new_empty(sum(widths))
    if not a.is_meta:
        blocks = sum(cdiv(width, LAUNCH["COLUMNS"]) for width in widths)
        there = [a if one is None else one for one in matrices]
        launcher.launch(column_sums_kernel, (blocks,), (*there, out), (*rows, *widths), LAUNCH)
    return out


def shipped() -> Iterator[Variant]:
    types = dict.fromkeys(["a", "b", "c", "out"], "*fp32")
    widths = ["a_width", "b_width", "c_width"]
    types |= dict.fromkeys(["a_rows", "b_rows", "c_rows", *widths], "i32")
    yield Variant(
        "column_sums", column_sums_kernel, types, LAUNCH, multiples=["a", "b", "c", "out", *widths]
    )
