"""LambdaLoss, NDCG and approximate ranks of lists through the C++ kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.cpu import compiled

SCALES = {"binary": 1 / math.log(2), "natural": 1.0}


@functools.lru_cache(maxsize=64)
def lambda_loss_options(
    scheme: str,
    k: int,
    sigma: float,
    mu: float,
    eps: float,
    reduction_log: str,
    reduction: str,
    num_threads: int,
) -> Any:
    scale = SCALES[reduction_log]
    return compiled().LambdaLossOptions(
        scheme=scheme,
        k=k,
        sigma=sigma,
        mu=mu,
        eps=eps,
        scale=scale,
        reduction=reduction,
        num_threads=num_threads,
    )


def lambda_loss_forward(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
    *,
    scheme: str,
    k: int,
    sigma: float,
    mu: float,
    eps: float,
    reduction_log: str,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend contract: see reference/lambda_loss.py."""
    if scores.dtype == torch.float32:
        kernel = compiled().lambda_loss_float
    elif scores.dtype == torch.float64:
        kernel = compiled().lambda_loss_double
    else:
        scores, kernel = scores.float(), compiled().lambda_loss_float
    num_lists = offsets.shape[0] - 1
    loss = scores.new_empty((num_lists,) if reduction == "none" else ())
    grad, pairs = torch.empty_like(scores), offsets.new_empty(())
    threads = torch.get_num_threads()
    done = kernel(
        lambda_loss_options(scheme, k, sigma, mu, eps, reduction_log, reduction, threads),
        scores.data_ptr(),
        labels.data_ptr(),
        offsets.data_ptr(),
        scores.shape[0],
        num_lists,
        loss.data_ptr(),
        grad.data_ptr(),
        pairs.data_ptr(),
    )
    if not done:
        ragged.check_offsets(offsets, scores.shape[0])  # which says what is wrong
    return loss, grad, pairs


def ndcg_forward(scores: Tensor, labels: Tensor, offsets: Tensor, k: int) -> Tensor:
    """The backend contract: (Q,) in the dtype of scores and labels, fp32 or fp64."""
    result = scores.new_empty(offsets.shape[0] - 1)
    kernel = compiled().ndcg_double if scores.dtype == torch.float64 else compiled().ndcg_float
    addresses = (scores.data_ptr(), labels.data_ptr(), offsets.data_ptr())
    sizes = (scores.shape[0], result.shape[0])
    if not kernel(*addresses, *sizes, k, torch.get_num_threads(), result.data_ptr()):
        ragged.check_offsets(offsets, scores.shape[0])
    return result


def approx_ranks_forward(scores: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    """The backend contract: ranks (N,) in the dtype of scores, fp32 or fp64."""
    ranks = torch.empty_like(scores)
    wide = scores.dtype == torch.float64
    kernel = compiled().approx_ranks_double if wide else compiled().approx_ranks_float
    addresses = (scores.data_ptr(), offsets.data_ptr())
    sizes = (scores.shape[0], offsets.shape[0] - 1)
    if not kernel(alpha, *addresses, *sizes, torch.get_num_threads(), ranks.data_ptr()):
        ragged.check_offsets(offsets, scores.shape[0])
    return ranks


def approx_ranks_backward(
    scores: Tensor,
    grad_ranks: Tensor,
    offsets: Tensor,
    alpha: float,
) -> Tensor:
    """The backend contract: the gradient of (N,) scores by that of (N,) ranks, fp32 or fp64."""
    grad = torch.empty_like(scores)
    kernels, wide = compiled(), scores.dtype == torch.float64
    kernel = kernels.approx_ranks_backward_double if wide else kernels.approx_ranks_backward_float
    addresses = (scores.data_ptr(), grad_ranks.data_ptr(), offsets.data_ptr())
    sizes = (scores.shape[0], offsets.shape[0] - 1)
    if not kernel(alpha, *addresses, *sizes, torch.get_num_threads(), grad.data_ptr()):
        ragged.check_offsets(offsets, scores.shape[0])
    return grad
