"""LambdaLoss on flat lists: schema -> fake -> backends -> autograd.Function -> lambda_loss()."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rerank_fast.ops import cpu

Scheme = Literal["none", "ndcg1", "ndcg2", "lambdarank", "ndcg2pp"]
ReductionLog = Literal["binary", "natural"]
Reduction = Literal["pairs", "lists", "sum", "none"]
Backend = Literal["reference", "cpu", "triton"]
_SCHEMES, _LOGS, _REDUCTIONS, _BACKENDS = map(get_args, (Scheme, ReductionLog, Reduction, Backend))

_LIBRARY = torch.library.Library("rerank_fast", "FRAGMENT")
_LIBRARY.define(
    "lambda_loss(Tensor scores, Tensor labels, Tensor offsets, str scheme, int k, float sigma, float mu, "
    "float eps, str reduction_log, str reduction, str backend) -> (Tensor loss, Tensor grad)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("rerank_fast::lambda_loss", lib=_LIBRARY)
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
) -> tuple[Tensor, Tensor]:
    compute_dtype = torch.promote_types(scores.dtype, torch.float32)
    shape = (offsets.shape[0] - 1,) if reduction == "none" else ()
    return scores.new_empty(shape, dtype=compute_dtype), scores.new_empty(scores.shape, dtype=compute_dtype)


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
) -> tuple[Tensor, Tensor]:
    # Triton is imported when it is first asked for.
    if backend == "cpu":
        forward = cpu.forward
    elif backend == "triton":
        from rerank_fast.ops.triton.lambda_loss import forward
    else:
        from rerank_fast.ops.reference import forward
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


_LIBRARY.impl("lambda_loss", _forward, "CompositeExplicitAutograd")


class _LambdaLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor, offsets: Tensor, options: tuple[Any, ...]) -> Tensor:
        loss, grad = torch.ops.rerank_fast.lambda_loss.default(scores, labels, offsets, *options)
        if loss.dim() == 0:
            ctx.save_for_backward(grad)
        else:
            ctx.save_for_backward(grad, offsets)
        ctx.dtype = scores.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, *offsets = ctx.saved_tensors
        if offsets:  # one upstream gradient a list: give each document its list's
            grad_loss = torch.repeat_interleave(grad_loss, offsets[0].diff(), output_size=grad.shape[0])
        # The product is taken in fp32: a loss scale then reaches fp16 gradients before they are rounded.
        product = grad * grad_loss
        return product if product.dtype == ctx.dtype else product.to(ctx.dtype), None, None, None


def _resolve_backend(backend: str | None, device: torch.device) -> str:
    if backend is None:
        if device.type == "cpu":
            return "cpu" if _cpu_available() else "reference"
        return "triton" if device.type == "cuda" and _HAS_TRITON else "reference"
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend 'cpu' takes CPU tensors, got tensors on {device}")
        if not _cpu_available():
            raise ValueError(f"backend 'cpu' can't run: {cpu.unavailable_reason()}")
    if backend == "triton":
        if not _HAS_TRITON:
            raise ValueError("backend 'triton' can't run: triton is not installed (pip install triton)")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend 'triton' takes CUDA or ROCm tensors, got tensors on {device}; "
                "set TRITON_INTERPRET=1 before the first use to run its interpreter on the CPU"
            )
    return backend


_HAS_TRITON = importlib.util.find_spec("triton") is not None  # found, not loaded
_warned: list[str] = []


def _cpu_available() -> bool:
    if not cpu.available() and not _warned and not torch.compiler.is_compiling():
        _warned.append("cpu")
        warnings.warn(
            f"rerank_fast runs LambdaLoss through its slower eager path: {cpu.unavailable_reason()}",
            RuntimeWarning,
            stacklevel=4,
        )
    return cpu.available()


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_tensors(scores: Tensor, labels: Tensor, offsets: Tensor) -> None:
    """Shapes, dtypes and devices; on the CPU the offsets' values too (reading a GPU's would wait for it)."""
    if scores.dim() != 1 or not scores.dtype.is_floating_point:
        raise ValueError(
            f"scores must be a floating-point tensor of shape (N,), got {scores.dtype} {tuple(scores.shape)}"
        )
    if labels.shape != scores.shape:
        raise ValueError(f"labels must have the shape of scores, {tuple(scores.shape)}, got {tuple(labels.shape)}")
    if labels.is_complex():
        raise ValueError(f"labels must be real numbers, got {labels.dtype}")
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be int64 of shape (Q + 1,), got {offsets.dtype} {tuple(offsets.shape)}")
    if not scores.device == labels.device == offsets.device:
        raise ValueError(
            "scores, labels and offsets must be on one device, "
            f"got {scores.device}, {labels.device} and {offsets.device}"
        )
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != scores.shape[0] or bounds != sorted(bounds):
            shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-4:]]
            raise ValueError(f"offsets must rise from 0 to N = {scores.shape[0]}, got {shown}")


def _check_k(k: int | None) -> None:
    if k is not None and k < 0:
        raise ValueError(f"k must be None or at least 0, got {k}")


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
    """LambdaLoss (Wang et al., CIKM 2018) of ragged lists, with its gradient computed in the same pass.

    Args:
        scores: (N,) model scores of all documents, list after list; fp16, bf16, fp32 or fp64.
        labels: (N,) relevance labels, binary or graded; gains are 2^max(label, 0) - 1.
        offsets: (Q + 1,) int64; list q holds the documents offsets[q] to offsets[q + 1].
        scheme: weighting of a preference pair: "none", "ndcg1", "ndcg2", "lambdarank" or "ndcg2pp".
        k: count pairs with at least one document ranked in the top k, and take the ideal DCG at k;
            None or 0 counts all.
        sigma: slope of the sigmoid.
        mu: share of NDCGLoss2 beside LambdaRank in "ndcg2pp".
        eps: least ideal DCG.
        reduction_log: "binary" (log2) or "natural".
        reduction: "pairs" divides the sum over all pairs by the number of pairs in the batch, as
            sentence-transformers does; "lists" divides it by Q; "sum" does not divide; "none" gives
            each list's own sum.
        backend: "cpu" (C++), "triton" or "reference"; None takes the device's own.

    Returns:
        The loss, () or (Q,) for "none", in fp32 (fp64 for fp64 scores). Only scores get a gradient,
        in their own dtype; differentiating twice raises RuntimeError.

    Raises:
        ValueError: a wrong shape, dtype, device or option, or a backend that can't run here.
    """
    _check_tensors(scores, labels, offsets)
    _check_choice("scheme", scheme, _SCHEMES)
    _check_choice("reduction_log", reduction_log, _LOGS)
    _check_choice("reduction", reduction, _REDUCTIONS)
    _check_k(k)
    resolved = _resolve_backend(backend, scores.device)
    label_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if labels.dtype != label_dtype or labels.requires_grad:
        labels = labels.detach().to(label_dtype)
    options = (scheme, k or 0, float(sigma), float(mu), float(eps), reduction_log, reduction, resolved)
    return _LambdaLoss.apply(scores, labels, offsets, options)


def count_pairs(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
    *,
    scheme: Scheme = "ndcg2pp",
    k: int | None = None,
) -> Tensor:
    """The number of pairs that lambda_loss(..., reduction="pairs") divides by, before it is raised to at least one.

    With it a batch in several parts is normalised as a whole: backpropagate the parts' losses with reduction="sum",
    each divided by the sum of their counts. Takes O(N log N) time and O(N) memory on any device, and never waits
    for it.

    Args:
        scores: (N,) as for lambda_loss; read only where k cuts, since the cut goes by rank.
        labels: (N,) relevance labels.
        offsets: (Q + 1,) int64.
        scheme: the loss's; "ndcg1" counts every ordered pair.
        k: the loss's cut.

    Returns:
        The number of pairs, () int64 on the device of the scores.

    Raises:
        ValueError: a wrong shape, dtype, device or option.
    """
    _check_tensors(scores, labels, offsets)
    _check_choice("scheme", scheme, _SCHEMES)
    _check_k(k)
    sizes = offsets.diff()
    if scheme == "ndcg1":
        return (sizes.square() - (sizes - k).clamp(min=0).square() if k else sizes.square()).sum()
    labels = labels.detach().to(torch.promote_types(scores.dtype, torch.float32))
    group = torch.repeat_interleave(sizes, output_size=scores.shape[0])
    total = _count_preferences(group, labels)
    if not k:
        return total
    # Less the pairs of two documents below the cut. All others go to a group of their own, of one label.
    order = _sort_within(group, scores.detach(), descending=True)
    below = torch.empty_like(group, dtype=torch.bool)
    below[order] = torch.arange(len(order), device=order.device) - offsets[group] >= k
    return total - _count_preferences(group.where(below, -1), labels.where(below, 0))


def _sort_within(group: Tensor, values: Tensor, *, descending: bool = False) -> Tensor:
    """The order that sorts (N,) values inside each group, group after group; ties keep the input order."""
    order = values.argsort(stable=True, descending=descending)
    return order[group[order].argsort(stable=True)]


def _count_preferences(group: Tensor, labels: Tensor) -> Tensor:
    """() int64: for every document the documents of its group with a lower label, summed; a NaN prefers nothing."""
    order = _sort_within(group, labels)
    group, labels = group[order], labels[order]
    index = torch.arange(len(order), device=order.device)
    starts_group = torch.ones_like(order, dtype=torch.bool)
    starts_group[1:] = group[1:] != group[:-1]
    starts_label = starts_group.clone()
    starts_label[1:] |= labels[1:] != labels[:-1]
    group_start, label_start = (index.where(at, 0).cummax(0).values for at in (starts_group, starts_label))
    return (label_start - group_start).where(labels == labels, 0).sum()
