"""Ranks that scores can be differentiated by: schema -> fake -> Function -> approx_ranks()."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops import backends, cpu, ragged
from rerank_fast.ops.backends import Backend
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.options import check_positive

_LIBRARY = torch.library.Library("rerank_fast", "FRAGMENT")
_REST = "Tensor offsets, float alpha, str backend"
_LIBRARY.define(
    f"approx_ranks(Tensor scores, {_REST}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"approx_ranks_backward(Tensor scores, Tensor grad_ranks, {_REST}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("rerank_fast::approx_ranks", lib=_LIBRARY)
def _fake(scores: Tensor, offsets: Tensor, alpha: float, backend: str) -> Tensor:
    return scores.new_empty(scores.shape)


@torch.library.register_fake("rerank_fast::approx_ranks_backward", lib=_LIBRARY)
def _fake_backward(scores: Tensor, *rest: Any) -> Tensor:
    return scores.new_empty(scores.shape)


def _reference_forward(scores: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    """The specification: one list at a time, its D x D sigmoids stored."""
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


def _forward(scores: Tensor, offsets: Tensor, alpha: float, backend: str) -> Tensor:
    # Triton is imported when it is first asked for.
    if backend == "cpu":  # which checks the offsets itself
        forward = cpu.approx_ranks_forward
    elif backend == "triton":
        from rerank_fast.ops.triton.approx_ranks import forward
    else:
        forward = _reference_forward
    if backend == "reference" or (backend == "triton" and offsets.is_cpu):
        ragged.check_offsets(offsets, scores.shape[0])
    return forward(scores.contiguous(), offsets.contiguous(), alpha)


def _backward(
    scores: Tensor,
    grad_ranks: Tensor,
    offsets: Tensor,
    alpha: float,
    backend: str,
) -> Tensor:
    if backend == "cpu":
        backward = cpu.approx_ranks_backward
    elif backend == "triton":
        from rerank_fast.ops.triton.approx_ranks import backward
    else:
        backward = _reference_backward
    return backward(scores.contiguous(), grad_ranks.contiguous(), offsets.contiguous(), alpha)


_LIBRARY.impl("approx_ranks", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("approx_ranks_backward", _backward, "CompositeExplicitAutograd")


class _ApproxRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, offsets: Tensor, options: tuple[float, str]) -> Tensor:
        ctx.save_for_backward(scores, offsets)
        ctx.options = options
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return torch.ops.rerank_fast.approx_ranks.default(wide, offsets, *options)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_ranks: Tensor) -> tuple[Tensor | None, ...]:
        scores, offsets = ctx.saved_tensors
        run = torch.ops.rerank_fast.approx_ranks_backward.default
        grad = run(scores.to(grad_ranks.dtype), grad_ranks, offsets, *ctx.options)
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
    options = (check_positive("alpha", alpha), backends.resolve("approx_ranks", backend, scores))
    return _ApproxRanks.apply(scores, offsets, options)
