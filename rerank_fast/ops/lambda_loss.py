"""LambdaLoss on flat lists: schema -> fake -> backends -> autograd.Function -> lambda_loss()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.choices import Reduction, ReductionLog, Scheme
from rerank_fast.ops.cpu import lists as cpu_lists
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.options import check_choice, check_cut, check_number, check_positive
from rerank_fast.ops.reference import lambda_loss as reference
from rerank_fast.ops.registry import Backend, Backends, Served, declare

_SCHEMES, _LOGS, _REDUCTIONS = map(get_args, (Scheme, ReductionLog, Reduction))


def _fake(
    scores: Tensor,
    labels: Tensor,
    offsets: Tensor,
    scheme: str,
    k: int,
    sigma: float,
    mu: float,
    eps: float,
    reduction_log: str,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    compute_dtype = torch.promote_types(scores.dtype, torch.float32)
    shape = (offsets.shape[0] - 1,) if reduction == "none" else ()
    loss, grad = (scores.new_empty(size, dtype=compute_dtype) for size in (shape, scores.shape))
    return loss, grad, offsets.new_empty(())


def _product(grad: Tensor, grad_loss: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Backward where PyTorch takes the product."""
    if grad_loss.dim():  # one upstream gradient a list: give each document its list's
        grad_loss = grad_loss[ragged.lists_of(offsets, grad.shape[0])]
    return (grad * grad_loss).to(dtype)


def _triton() -> tuple[Callable[..., Any], ...]:
    from rerank_fast.ops.triton import lambda_loss

    return lambda_loss.forward, lambda_loss.backward  # one launch in every mode


_BACKENDS = Backends(
    "lambda_loss",
    reference=Served(lambda: (reference.forward, _product)),
    cpu=Served(lambda: (cpu_lists.lambda_loss_forward, _product)),
    triton=Served(_triton),
)


@declare("lambda_loss", fake=_fake)
def _forward(
    scores: Tensor,
    labels: Tensor,
    offsets: Tensor,
    scheme: str,
    k: int,
    sigma: float,
    mu: float,
    eps: float,
    reduction_log: str,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    forward, _ = _BACKENDS[backend]
    return forward(
        scores.contiguous(),
        labels.contiguous(),
        offsets.contiguous(),
        scheme=scheme,
        k=k,
        sigma=sigma,
        mu=mu,
        eps=eps,
        reduction_log=reduction_log,
        reduction=reduction,
    )


def _fake_backward(
    grad: Tensor, grad_loss: Tensor, offsets: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


@declare("lambda_loss_backward", fake=_fake_backward)
def _backward(
    grad: Tensor, grad_loss: Tensor, offsets: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    _, backward = _BACKENDS[backend]
    return backward(grad, grad_loss.contiguous(), offsets.contiguous(), dtype)


_NO_GRADIENTS = (None,) * 4  # of labels, offsets, options, counts


class _LambdaLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        labels: Tensor,
        offsets: Tensor,
        options: tuple[Any, ...],
        counts: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        loss, grad, pairs = _forward(scores, labels, offsets, *options)
        if loss.dim() == 0 and grad.dtype == scores.dtype:  # backward is one product
            ctx.save_for_backward(scores, grad)
        else:
            ctx.dtype, ctx.backend = scores.dtype, options[-1]
            ctx.save_for_backward(scores, grad, offsets)
        if not counts:
            return loss
        ctx.mark_non_differentiable(pairs)
        return loss, pairs

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_loss: Tensor, *of_pairs: Tensor) -> tuple[Tensor | None, ...]:
        _, grad, *offsets = ctx.saved_tensors
        if offsets:
            # The product is taken in fp32: a loss scale then reaches fp16 gradients before they are
            # rounded.
            grad = _backward(grad, grad_loss, offsets[0], ctx.dtype, ctx.backend)
            return grad, *_NO_GRADIENTS
        if grad_loss.is_cpu and not torch.compiler.is_compiling() and grad_loss.item() == 1:
            # loss.backward() itself; on a GPU looking would wait for it.
            return grad, *_NO_GRADIENTS
        return grad * grad_loss, *_NO_GRADIENTS


def lambda_loss(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
    *,
    scheme: Scheme = "ndcg2pp",
    k: int | None = None,
    sigma: float = 1.0,
    mu: float = 10.0,
    eps: float = 1e-10,
    reduction_log: ReductionLog = "binary",
    reduction: Reduction = "pairs",
    backend: Backend | None = None,
) -> Tensor:
    """LambdaLoss (Wang et al., CIKM 2018) of ragged lists, with its gradient computed in the same
    pass.

    Divergence is seen, and in its list: where a score is NaN, infinite or beyond 2^64 / max(sigma,
    1), or a label is NaN or +inf in the loss's dtype, the list's loss is NaN and so is the gradient
    of each of its documents, whatever the scheme, the cut and the other labels. With reduction
    "none" the other lists keep their losses; every other reduction is NaN too. The other lists'
    gradients stay what they are, and the list still counts its pairs, of which a NaN label has
    none. A label of -inf is one below all others.

    Args:
        scores: (N,) model scores of all documents, list after list; fp16, bf16, fp32 or fp64.
        labels: (N,) relevance labels, binary or graded; gains are 2^max(label, 0) - 1.
        offsets: (Q + 1,) int64; list q holds the documents offsets[q] to offsets[q + 1]. A GPU's
            values are not waited for: if they do not rise from 0 to N, the loss and the whole
            gradient are NaN.
        scheme: weighting of a preference pair: "none", "ndcg1", "ndcg2", "lambdarank" or "ndcg2pp".
        k: count pairs with at least one document ranked in the top k, and take the ideal DCG at k;
            None or 0 counts all.
        sigma: slope of the sigmoid, above 0.
        mu: share of NDCGLoss2 beside LambdaRank in "ndcg2pp", at least 0.
        eps: least ideal DCG, above 0.
        reduction_log: "binary" (log2) or "natural".
        reduction: "pairs" divides the sum over all pairs by the number of pairs in the batch, as
            sentence-transformers does; "lists" divides it by Q; "sum" does not divide; "none" gives
            each list's own sum.
        backend: "cpu" (C++), "triton" or "reference"; None takes the device's own.

    Returns:
        The loss, () or (Q,) for "none", in fp32 (fp64 for fp64 scores). Only scores get a gradient,
        in their own dtype; differentiating twice raises RuntimeError.

    Raises:
        ValueError: a wrong shape, dtype, device or option, a backend that can't run here, or
            offsets on the CPU that do not rise from 0 to N.
    """
    weighting = (scheme, k, sigma, mu, eps, reduction_log)
    return _LambdaLoss.apply(
        *_checked(scores, labels, offsets, *weighting, reduction, backend), False
    )


def summed_lambda_loss(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
    *,
    scheme: Scheme,
    k: int | None,
    sigma: float,
    mu: float,
    eps: float,
    reduction_log: ReductionLog,
) -> tuple[Tensor, Tensor]:
    """lambda_loss with reduction "sum", and the number of pairs that it is the sum over, () int64.

    The number is that of the kernel which visited them, and carries no gradient.
    """
    weighting = (scheme, k, sigma, mu, eps, reduction_log)
    return _LambdaLoss.apply(*_checked(scores, labels, offsets, *weighting, "sum", None), True)


def _checked(
    scores: Tensor,
    labels: Tensor,
    offsets: Tensor,
    scheme: Scheme,
    k: int | None,
    sigma: float,
    mu: float,
    eps: float,
    reduction_log: ReductionLog,
    reduction: Reduction,
    backend: Backend | None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    """What the op takes: scores, labels in its dtype, offsets, and its options."""
    ragged.check_lists(scores, labels, offsets)
    check_choice("scheme", scheme, _SCHEMES)
    check_choice("reduction_log", reduction_log, _LOGS)
    check_choice("reduction", reduction, _REDUCTIONS)
    slope, least = check_positive("sigma", sigma), check_positive("eps", eps)
    weighting = (scheme, check_cut(k), slope, check_number("mu", mu, least=0), least)
    resolved = _BACKENDS.resolve(backend, scores)
    label_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if labels.dtype != label_dtype or labels.requires_grad:
        labels = labels.detach().to(label_dtype)
    return scores, labels, offsets, (*weighting, reduction_log, reduction, resolved)


def _fake_count(scores: Tensor, labels: Tensor, offsets: Tensor, scheme: str, k: int) -> Tensor:
    return offsets.new_empty(())


@declare("count_pairs", fake=_fake_count)
def _count(scores: Tensor, labels: Tensor, offsets: Tensor, scheme: str, k: int) -> Tensor:
    if offsets.is_cpu:
        ragged.check_offsets(offsets, scores.shape[0])
    sizes = offsets.diff()
    if scheme == "ndcg1":
        return (sizes.square() - (sizes - k).clamp(min=0).square() if k else sizes.square()).sum()
    if scores.shape[0] == 0:
        return offsets.new_zeros(())
    group = ragged.lists_of(offsets, scores.shape[0])
    total = _count_preferences(group, labels)
    if not k:
        return total
    # Less the pairs of two documents below the cut. All others go to a group of their own, of one
    # label.
    order = _sort_within(group, scores, descending=True)
    below = torch.empty_like(group, dtype=torch.bool)
    below[order] = torch.arange(len(order), device=order.device) - offsets[group] >= k
    return total - _count_preferences(group.where(below, -1), labels.where(below, 0))


def count_pairs(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
    *,
    scheme: Scheme = "ndcg2pp",
    k: int | None = None,
) -> Tensor:
    """The number of pairs that lambda_loss(..., reduction="pairs") divides by, before it is raised
    to at least one.

    With it a batch in several parts is normalised as a whole: backpropagate the parts' losses with
    reduction="sum", each divided by the sum of their counts. Takes O(N log N) time and O(N) memory
    on any device, and never waits for it.

    Args:
        scores: (N,) as for lambda_loss; read only where k cuts, since the cut goes by rank: NaN
            ranks first.
        labels: (N,) relevance labels; a NaN is preferred to nothing, and nothing to it.
        offsets: (Q + 1,) int64. A GPU's values are not waited for: if they do not rise from 0 to N
            the number means nothing.
        scheme: the loss's; "ndcg1" counts every ordered pair.
        k: the loss's cut.

    Returns:
        The number of pairs, () int64 on the device of the scores.

    Raises:
        ValueError: a wrong shape, dtype, device or option, or offsets on the CPU that do not rise
            from 0 to N.
    """
    ragged.check_lists(scores, labels, offsets)
    check_choice("scheme", scheme, _SCHEMES)
    labels = labels.detach().to(torch.promote_types(scores.dtype, torch.float32))
    return _count(scores.detach(), labels, offsets, scheme, check_cut(k))


def _sort_within(group: Tensor, values: Tensor, *, descending: bool = False) -> Tensor:
    """The order that sorts (N,) values inside each group, group after group; ties keep the input
    order.
    """
    order = values.argsort(stable=True, descending=descending)
    return order[group[order].argsort(stable=True)]


def _count_preferences(group: Tensor, labels: Tensor) -> Tensor:
    """() int64: for every document the documents of its group with a lower label, summed; a NaN
    prefers nothing.
    """
    order = _sort_within(group, labels)
    group, labels = group[order], labels[order]
    index = torch.arange(len(order), device=order.device)
    starts_group = torch.ones_like(order, dtype=torch.bool)
    starts_group[1:] = group[1:] != group[:-1]
    starts_label = starts_group.clone()
    starts_label[1:] |= labels[1:] != labels[:-1]
    group_start, label_start = (
        index.where(at, 0).cummax(0).values for at in (starts_group, starts_label)
    )
    return (label_start - group_start).where(labels == labels, 0).sum()
