"""Ranks that scores can be differentiated by: schema -> fake -> Function -> approx_ranks()."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.cpu import lists as cpu_lists
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.options import check_positive
from rerank_fast.ops.registry import Backend, Backends, Served, declare


def _fake(scores: Tensor, offsets: Tensor, alpha: float, backend: str) -> Tensor:
    return scores.new_empty(scores.shape)


def _fake_backward(scores: Tensor, *rest: Any) -> Tensor:
    return scores.new_empty(scores.shape)


def _reference_forward(scores: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    """The specification: one list at a time, its D x D sigmoids stored."""
    ragged.check_offsets(offsets, scores.shape[0])
    ranks = [scores[:0]]
    for start, stop in pairwise(offsets.tolist()):
        s = scores[start:stop]
        above = torch.sigmoid(alpha * (s[None, :] - s[:, None]))
        ranks.append(0.5 + above.sum(dim=1))  # 1, less the document's own half
    return torch.cat(ranks)


def _reference_backward(
    scores: Tensor,
    grad_ranks: Tensor,
    offsets: Tensor,
    alpha: float,
) -> Tensor:
    grads = [scores[:0]]
    for start, stop in pairwise(offsets.tolist()):
        s, grad = scores[start:stop], grad_ranks[start:stop]
        d = alpha * (s[None, :] - s[:, None])
        slope = torch.sigmoid(d) * torch.sigmoid(-d)
        grads.append(alpha * ((grad[None, :] - grad[:, None]) * slope).sum(dim=1))
    return torch.cat(grads)


def _triton() -> tuple[Callable[..., Any], ...]:
    from rerank_fast.ops.triton import approx_ranks

    return approx_ranks.forward, approx_ranks.backward


_BACKENDS = Backends(
    "approx_ranks",
    reference=Served(lambda: (_reference_forward, _reference_backward)),
    cpu=Served(lambda: (cpu_lists.approx_ranks_forward, cpu_lists.approx_ranks_backward)),
    triton=Served(_triton),
)


@declare("approx_ranks", fake=_fake)
def _forward(scores: Tensor, offsets: Tensor, alpha: float, backend: str) -> Tensor:
    forward, _ = _BACKENDS[backend]
    return forward(scores.contiguous(), offsets.contiguous(), alpha)


@declare("approx_ranks_backward", fake=_fake_backward)
def _backward(
    scores: Tensor,
    grad_ranks: Tensor,
    offsets: Tensor,
    alpha: float,
    backend: str,
) -> Tensor:
    _, backward = _BACKENDS[backend]
    return backward(scores.contiguous(), grad_ranks.contiguous(), offsets.contiguous(), alpha)


class _ApproxRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, offsets: Tensor, options: tuple[float, str]) -> Tensor:
        ctx.save_for_backward(scores, offsets)
        ctx.options = options
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return _forward(wide, offsets, *options)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_ranks: Tensor) -> tuple[Tensor | None, ...]:
        scores, offsets = ctx.saved_tensors
        grad = _backward(scores.to(grad_ranks.dtype), grad_ranks, offsets, *ctx.options)
        return grad.to(scores.dtype), None, None


def approx_ranks(
    scores: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
    *,
    alpha: float = 1.0,
    backend: Backend | None = None,
) -> Tensor:
    """Each document's rank in its list as its scores' differences say it smoothly: ApproxRank.

    r_i = 1 + sum over j != i of sigmoid(alpha (s_j - s_i)), which is the rank of s_i from the
    highest score where all differences are large beside 1 / alpha; Qin, Liu and Li, "A General
    Approximation Framework for Direct Optimization of Information Retrieval Measures", 2010. Takes
    D^2 time of a list of D documents, and O(N) memory. Tied documents share the mean of their
    ranks. A NaN score makes its list's ranks, and their gradients, NaN.

    Args:
        scores: (N,) model scores of all documents, list after list; fp16, bf16, fp32 or fp64.
        offsets: (Q + 1,) int64; list q holds the documents offsets[q] to offsets[q + 1]. A GPU's
            values are not waited for: of a list that does not lie in 0 to N ranks mean nothing.
        alpha: how sharply ranks follow scores, above 0.
        backend: "cpu" (C++), "triton" or "reference"; None takes the device's own.

    Returns:
        (N,) in fp32 (fp64 for fp64 scores); the gradient of scores has their own dtype.
        Differentiating twice raises RuntimeError.

    Raises:
        ValueError: a wrong shape, dtype, device or alpha, a backend that can't run here, or offsets
            on the CPU that do not rise from 0 to N.
    """
    ragged.check_lists(scores, scores, offsets)
    options = (check_positive("alpha", alpha), _BACKENDS.resolve(backend, scores))
    return _ApproxRanks.apply(scores, offsets, options)
