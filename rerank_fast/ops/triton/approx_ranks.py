"""Approximate ranks in Triton: a program a block of documents; nothing of size D x D."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.triton import autotune, guard, launcher
from rerank_fast.ops.triton.grid import cdiv
from rerank_fast.ops.triton.variant import Variant

LAUNCH = launcher.Config({"ROWS": 16, "COLUMNS": 64, "num_warps": 4, "enable_fp_fusion": True})
LAUNCH_FP64 = launcher.Config(LAUNCH | {"num_warps": 8})  # which fill twice the registers
# What tuning tries beside them.
AROUND: tuple[dict[str, Any], ...] = ({"num_warps": 2}, {"num_warps": 8}, {"ROWS": 32})


@triton.jit(do_not_specialize=["n"])
def approx_ranks_kernel(
    scores,  # (N,) compute dtype
    grad_ranks,  # (N,) compute dtype; read under BACKWARD
    offsets,  # (Q + 1,) int64
    lists,  # (N,) int64: each document's list
    out,  # (N,) compute dtype: ranks, or under BACKWARD the scores' gradient
    n,
    alpha: tl.constexpr,
    BACKWARD: tl.constexpr,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS documents in a row, of one list or several, against the documents of these lists."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    i = first + tl.arange(0, ROWS)
    in_i = i < n
    s_i = tl.load(scores + i, mask=in_i, other=0.0)[:, None]
    g_i = tl.load(grad_ranks + i, mask=in_i, other=0.0)[:, None] if BACKWARD else s_i
    list_i = tl.load(lists + i, mask=in_i, other=0)
    start = tl.load(offsets + tl.load(lists + first))
    stop = tl.load(offsets + tl.load(lists + tl.minimum(first + ROWS, n) - 1) + 1)
    # Whatever the offsets say, no more is read than there is.
    start, stop = tl.maximum(start, 0), tl.minimum(stop, n)
    # Places from here on, which 32 bits hold.
    own = tl.minimum(tl.maximum(tl.load(offsets + list_i) - start, 0), n).to(tl.int32)[:, None]
    end = tl.minimum(tl.maximum(tl.load(offsets + list_i + 1) - start, 0), n).to(tl.int32)[:, None]
    sums = tl.zeros([ROWS, COLUMNS], dtype)
    for tile in range(0, (stop - start).to(tl.int32), COLUMNS):
        j = tile + tl.arange(0, COLUMNS)
        in_j = j < stop - start
        s_j = tl.load(scores + start + j, mask=in_j, other=0.0)[None, :]
        d = alpha * (s_j - s_i)
        t = tl.exp(-tl.abs(d))
        r = 1.0 / (1.0 + t)
        if BACKWARD:
            g_j = tl.load(grad_ranks + start + j, mask=in_j, other=0.0)[None, :]
            term = (g_j - g_i) * (t * r * r)
        else:
            term = tl.where(d < 0.0, t * r, r)
        # What follows the document's list is beyond its end, documents or none.
        sums += tl.where((j[None, :] >= own) & (j[None, :] < end), term, 0.0)
    total = tl.sum(sums, axis=1)
    if BACKWARD:
        total = alpha * total
    else:
        total += 0.5  # 1, less the document's own half
    tl.store(out + i, total, mask=in_i)


def _launch(scores: Tensor, grad_ranks: Tensor | None, offsets: Tensor, alpha: float) -> Tensor:
    guard.require_gpu(scores)
    if offsets.is_cpu:
        ragged.check_offsets(offsets, scores.shape[0])
    out = torch.empty_like(scores)
    n = scores.shape[0]
    if n:
        lists = ragged.lists_of(offsets, n)
        wide = scores.dtype == torch.float64
        dtype, launch = (tl.float64, LAUNCH_FP64) if wide else (tl.float32, LAUNCH)
        case = ("BACKWARD", "dtype")
        kernel, config = autotune.choose(approx_ranks_kernel, launch, AROUND, case)
        grads = scores if grad_ranks is None else grad_ranks
        launcher.launch(
            kernel,
            lambda meta: (cdiv(n, meta["ROWS"]),),
            (scores, grads, offsets, lists, out),
            (n,),
            launcher.constants(alpha=alpha, BACKWARD=grad_ranks is not None, dtype=dtype),
            config,
        )
    return out


def forward(scores: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    """The backend contract: ranks (N,) in the dtype of scores, fp32 or fp64."""
    return _launch(scores, None, offsets, alpha)


def backward(scores: Tensor, grad_ranks: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    """The backend contract: the gradient of (N,) scores by that of (N,) ranks, fp32 or fp64."""
    return _launch(scores, grad_ranks, offsets, alpha)


def shipped() -> Iterator[Variant]:
    for dtype, config in ((tl.float32, LAUNCH), (tl.float64, LAUNCH_FP64)):
        types = dict.fromkeys(("scores", "grad_ranks", "out"), f"*{dtype}")
        types |= {"offsets": "*i64", "lists": "*i64", "n": "i32"}
        for backward, name in ((False, "forward"), (True, "backward")):
            constants = {"alpha": 1.0, "BACKWARD": backward, "dtype": dtype}
            name = f"approx_ranks-{name}_{dtype}"
            yield Variant(name, approx_ranks_kernel, types, config, constants)
