"""NDCG of ragged lists, for monitoring: schema -> fake -> backends -> ndcg()."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.cpu import lists as cpu_lists
from rerank_fast.ops.options import check_cut
from rerank_fast.ops.reference import lambda_loss as reference
from rerank_fast.ops.registry import Backend, Backends, Served, declare


def _fake(scores: Tensor, labels: Tensor, offsets: Tensor, k: int, backend: str) -> Tensor:
    return labels.new_empty(offsets.shape[0] - 1)


def _reference_forward(scores: Tensor, labels: Tensor, offsets: Tensor, k: int) -> Tensor:
    """The specification: one list at a time."""
    ragged.check_offsets(offsets, scores.shape[0])
    values = [labels.new_zeros(0)]
    for start, stop in pairwise(offsets.tolist()):
        s, relevance = scores[start:stop], labels[start:stop].clamp(min=0)
        if bool((s.isnan() | ~relevance.isfinite()).any()):
            values.append(labels.new_full((1,), torch.nan))
            continue
        if bool((relevance == 0).all()):
            values.append(labels.new_zeros(1))
            continue
        # Divided by 2^largest above and below, so that a large label stays finite.
        largest = relevance.max()
        gains = torch.exp2(relevance - largest) - torch.exp2(-largest)
        discount = reference.discounts(stop - start, dtype=labels.dtype, device=labels.device)
        tied = (s[:, None] == s[None, :]).to(gains.dtype)
        expected = tied @ gains / tied.sum(dim=1)  # at any rank of a tie
        rank = reference.ranks(s)
        found = (expected / discount[rank - 1])[rank <= (k or len(rank))].sum()
        ideal = (gains.sort(descending=True).values / discount)[: k or None].sum()
        values.append((found / ideal)[None])
    return torch.cat(values)


def _triton() -> tuple[Callable[..., Any], ...]:
    from rerank_fast.ops.triton import ndcg

    return (ndcg.forward,)


_BACKENDS = Backends(
    "ndcg",
    reference=Served(lambda: (_reference_forward,)),
    cpu=Served(lambda: (cpu_lists.ndcg_forward,)),
    triton=Served(_triton),
)


@declare("ndcg", fake=_fake)
def _forward(scores: Tensor, labels: Tensor, offsets: Tensor, k: int, backend: str) -> Tensor:
    (forward,) = _BACKENDS[backend]
    return forward(scores.contiguous(), labels.contiguous(), offsets.contiguous(), k)


def ndcg(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
    k: int | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """NDCG@k of each list, on the scores' device and without waiting for it.

    Gains are 2^max(label, 0) - 1, discounts log2(1 + rank). Where documents tie in score it is the
    expected value over the orders of the tie, whatever the order of input.

    Args:
        scores: (N,) model scores of all documents, list after list; fp16, bf16, fp32 or fp64.
        labels: (N,) relevance labels, binary or graded.
        offsets: (Q + 1,) int64; list q holds the documents offsets[q] to offsets[q + 1]. A GPU's
            values are not waited for: a list that does not lie in 0 to N is NaN, and so is the
            first where it does not begin at 0 and the last where it does not end at N.
        k: ranks that count; None or 0 counts all.
        backend: "cpu" (C++), "triton" or "reference"; None takes the device's own.

    Returns:
        (Q,) in fp32 (fp64 for fp64 scores), without gradient. A list with a score that is NaN, or a
        label that is NaN or +inf, gives NaN; any other without a label above 0 gives 0. Infinite
        scores are the extremes and tie with each other; a label of -inf gains nothing.

    Raises:
        ValueError: a wrong shape, dtype, device or k, a backend that can't run here, or offsets on
            the CPU that do not rise from 0 to N.
    """
    ragged.check_lists(scores, labels, offsets)
    cut = check_cut(k)
    resolved = _BACKENDS.resolve(backend, scores)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    scores, labels = scores.detach().to(dtype), labels.detach().to(dtype)
    return _forward(scores, labels, offsets, cut, resolved)
