"""NDCG in Triton: one launch, a program a list, ranks by counting; nothing of size D x D is
stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.triton import autotune, guard, launcher
from rerank_fast.ops.triton.variant import Variant

LAUNCH = launcher.Config({"BLOCK": 32, "num_warps": 4, "enable_fp_fusion": True})
LAUNCH_FP64 = launcher.Config(LAUNCH | {"num_warps": 8})
# What tuning tries beside them.
AROUND: tuple[dict[str, Any], ...] = (
    {"num_warps": 1},
    {"num_warps": 2},
    {"num_warps": 8},
    {"BLOCK": 64},
)


@triton.jit(do_not_specialize=["k", "n"])
def ndcg_kernel(
    scores,  # (N,) compute dtype
    labels,  # (N,) compute dtype
    offsets,  # (Q + 1,) int64
    ndcg,  # out (Q,) compute dtype
    k,
    n,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One list: how many documents go before each by score and by label, in tiles of its documents.

    Each document has the mean gain of its tie in score: its rank within the tie is no matter. A
    list that does not lie in the documents is NaN, and so is the first or the last where documents
    are left out.
    """
    own = tl.program_id(0)
    start = tl.load(offsets + own)
    end = tl.load(offsets + own + 1)
    lies = (start >= 0) & (start <= end) & (end <= n)
    lies = lies & ((own > 0) | (start == 0)) & ((own < tl.num_programs(0) - 1) | (end == n))
    size = tl.where(lies, end - start, 0).to(tl.int32)
    highest = tl.zeros([BLOCK], dtype)
    nans = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        y = tl.load(labels + start + i, mask=i < size, other=0.0)
        s = tl.load(scores + start + i, mask=i < size, other=0.0)
        highest = tl.maximum(highest, y)
        nans += ((y != y) | (y == float("inf")) | (s != s)).to(tl.int32)
    largest = tl.max(highest, axis=0)
    unit = tl.exp2(-largest)
    found = tl.zeros([BLOCK], dtype)
    ideal = tl.zeros([BLOCK], dtype)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        in_i = i < size
        s_i = tl.load(scores + start + i, mask=in_i, other=0.0)[:, None]
        y_i = tl.load(labels + start + i, mask=in_i, other=0.0)
        before = tl.zeros([BLOCK], tl.int32)
        tied = tl.zeros([BLOCK], tl.int32)
        gains = tl.zeros([BLOCK], dtype)
        # One order after the other: both at once would take more registers than half of the warps
        # have.
        for tile in range(0, size, BLOCK):
            j = tile + tl.arange(0, BLOCK)
            in_j = (j < size)[None, :]
            s_j = tl.load(scores + start + j, mask=j < size, other=0.0)[None, :]
            y_j = tl.load(labels + start + j, mask=j < size, other=0.0)[None, :]
            gain_j = tl.exp2(tl.maximum(y_j, 0.0) - largest) - unit
            equal = (s_j == s_i) & in_j
            above = ((s_j > s_i) & in_j) | (equal & (j[None, :] < i[:, None]))
            before += tl.sum(above.to(tl.int32), axis=1)
            tied += tl.sum(equal.to(tl.int32), axis=1)
            gains += tl.sum(tl.where(equal, gain_j, 0.0), axis=1)
        expected = tl.where(in_i, gains / tl.maximum(tied, 1).to(dtype), 0.0)
        found += tl.where((k == 0) | (before < k), expected / tl.log2(2.0 + before.to(dtype)), 0.0)
        better = tl.zeros([BLOCK], tl.int32)
        for tile in range(0, size, BLOCK):
            j = tile + tl.arange(0, BLOCK)
            y_j = tl.load(labels + start + j, mask=j < size, other=0.0)[None, :]
            equal = (y_j == y_i[:, None]) & (j[None, :] < i[:, None])
            above = ((y_j > y_i[:, None]) | equal) & (j < size)[None, :]
            better += tl.sum(above.to(tl.int32), axis=1)
        # Both sums are divided by 2^largest, so that a large label stays finite.
        gain = tl.where(in_i, tl.exp2(tl.maximum(y_i, 0.0) - largest) - unit, 0.0)
        ideal += tl.where((k == 0) | (better < k), gain / tl.log2(2.0 + better.to(dtype)), 0.0)
    best = tl.sum(ideal, axis=0)
    value = tl.where(largest > 0.0, tl.sum(found, axis=0) / tl.where(largest > 0.0, best, 1.0), 0.0)
    value = tl.where((tl.sum(nans, axis=0) > 0) | (lies == 0), float("nan"), value)
    tl.store(ndcg + own, value)


def forward(scores: Tensor, labels: Tensor, offsets: Tensor, k: int) -> Tensor:
    """The backend contract: (Q,) in the dtype of scores and labels, fp32 or fp64."""
    guard.require_gpu(scores)
    if offsets.is_cpu:
        ragged.check_offsets(offsets, scores.shape[0])
    num_lists = offsets.shape[0] - 1
    result = torch.empty(num_lists, dtype=scores.dtype, device=scores.device)
    if num_lists:
        dtype = tl.float64 if scores.dtype == torch.float64 else tl.float32
        kernel, config = autotune.choose(
            ndcg_kernel, LAUNCH_FP64 if dtype == tl.float64 else LAUNCH, AROUND, ("dtype",)
        )
        tensors, n = (scores, labels, offsets, result), scores.shape[0]
        of = launcher.constants(dtype=dtype)
        launcher.launch(kernel, (num_lists,), tensors, (min(k, n), n), of, config)
    return result


def shipped() -> Iterator[Variant]:
    for dtype, launch in ((tl.float32, LAUNCH), (tl.float64, LAUNCH_FP64)):
        types = {
            "scores": f"*{dtype}",
            "labels": f"*{dtype}",
            "offsets": "*i64",
            "ndcg": f"*{dtype}",
        }
        types |= {"k": "i32", "n": "i32"}
        yield Variant(f"ndcg-ndcg_{dtype}", ndcg_kernel, types, launch, {"dtype": dtype})
