"""The specification of LambdaLoss: eager PyTorch, one list at a time, in the notation of the paper.

Wang, Li, Golbandi, Bendersky, Najork: "The LambdaLoss Framework for Ranking Metric Optimization",
CIKM 2018. It stores D x D matrices and reads offsets on the host: every backend is measured against
it, none uses it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from rerank_fast.ops import ragged


def ranks(scores: Tensor) -> Tensor:
    """1-based rank of each of the (D,) scores, highest first; ties keep the input order, NaN comes
    first.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    result = torch.empty_like(order)
    result[order] = torch.arange(1, scores.numel() + 1, device=scores.device)
    return result


def discounts(num_documents: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """D(r) = log2(1 + r) for r = 1..num_documents."""
    return torch.log2(torch.arange(2, num_documents + 2, dtype=dtype, device=device))


def normalized_gains(labels: Tensor, k: int, eps: float) -> Tensor:
    """G_i = (2^y+_i - 1) / Z of one list of (D,) labels, Z its ideal DCG@k, at least eps.

    Numerator and Z are both divided by 2^max(y+), so that a large label gives a finite gain.
    """
    relevance = labels.clamp(min=0)
    largest = relevance.max()
    gains = torch.exp2(relevance - largest) - torch.exp2(-largest)
    ideal = torch.sort(gains, descending=True).values
    dcg = ideal / discounts(labels.numel(), dtype=labels.dtype, device=labels.device)
    return gains / torch.maximum(dcg[: k or None].sum(), eps * torch.exp2(-largest))


# Scores beyond it, or beyond it once multiplied by sigma, are divergence: their margins, and sums
# of them, could overflow, each backend's elsewhere.
LARGEST_SCORE = 2.0**64


def diverged(scores: Tensor, labels: Tensor, sigma: float) -> Tensor:
    """() bool: whether a list of (D,) scores and labels has NaN for its loss.

    Where a score is NaN or beyond LARGEST_SCORE / max(sigma, 1), or a label is NaN or +inf.
    """
    within = scores.abs() <= LARGEST_SCORE / max(sigma, 1.0)  # false for NaN
    return ~(within & (labels < torch.inf)).all()


def pair_mask(labels: Tensor, rank: Tensor, *, scheme: str, k: int) -> Tensor:
    """(D, D) bool: the pairs (i, j) that count."""
    preferred = (
        torch.ones(labels.numel(), labels.numel(), dtype=torch.bool, device=labels.device)
        if scheme == "ndcg1"
        else labels[:, None] > labels[None, :]
    )
    if k == 0:
        return preferred
    return preferred & ((rank[:, None] <= k) | (rank[None, :] <= k))


def pair_weights(gains: Tensor, rank: Tensor, *, scheme: str, mu: float) -> Tensor:
    """(D, D) weights w_ij of a weighting scheme from (D,) normalised gains and 1-based ranks."""
    # One more discount than documents: delta(d) reads D(d + 1).
    discount = discounts(rank.numel() + 1, dtype=gains.dtype, device=gains.device)
    inverse = discount[rank - 1].reciprocal()
    if scheme == "none":
        return torch.ones(rank.numel(), rank.numel(), dtype=gains.dtype, device=gains.device)
    if scheme == "ndcg1":
        return (gains * inverse)[:, None].expand(rank.numel(), rank.numel())
    gain_difference = (gains[:, None] - gains[None, :]).abs()
    weights = torch.zeros_like(gain_difference)
    if scheme in ("lambdarank", "ndcg2pp"):
        weights = (inverse[:, None] - inverse[None, :]).abs() * gain_difference
    if scheme in ("ndcg2", "ndcg2pp"):
        distance = (rank[:, None] - rank[None, :]).abs()
        delta = 1 / discount[(distance - 1).clamp(min=0)] - 1 / discount[distance]
        ndcg2 = delta.masked_fill(distance == 0, 0) * gain_difference
        weights = mu * ndcg2 + weights if scheme == "ndcg2pp" else ndcg2
    return weights


def _weighted_differences(
    s: Tensor, y: Tensor, *, scheme: str, k: int, mu: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one list of (D,) scores and labels: (D, D) mask of its pairs, weights, and s_i - s_j."""
    differences = s[:, None] - s[None, :]
    if s.numel() == 0:
        return differences.bool(), differences.detach(), differences
    rank = ranks(s.detach())
    mask = pair_mask(y, rank, scheme=scheme, k=k)
    return mask, pair_weights(normalized_gains(y, k, eps), rank, scheme=scheme, mu=mu), differences


def _divisor(reduction: str, num_pairs: int, num_lists: int) -> int:
    return {"pairs": max(num_pairs, 1), "lists": max(num_lists, 1), "sum": 1, "none": 1}[reduction]


def lambda_loss(
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
) -> Tensor:
    """The loss as written, differentiable in the scores: () or, for reduction "none", (Q,).

    fp16 and bf16 scores are upcast to fp32; weights, ranks and masks carry no gradient. A list that
    diverged has NaN for its loss and for the gradient of each of its scores, and counts its pairs.
    """
    compute_dtype = torch.promote_types(scores.dtype, torch.float32)
    scores, labels, bounds = scores.to(compute_dtype), labels.to(compute_dtype), offsets.tolist()
    scale = 1 / math.log(2) if reduction_log == "binary" else 1.0
    losses, num_pairs = [], 0
    for start, stop in pairwise(bounds):
        s, y = scores[start:stop], labels[start:stop]
        mask, weights, differences = _weighted_differences(s, y, scheme=scheme, k=k, mu=mu, eps=eps)
        log_probabilities = torch.nn.functional.logsigmoid(sigma * differences)
        loss = -scale * (weights * log_probabilities)[mask].sum()
        losses.append((s * torch.nan).sum() if diverged(s.detach(), y, sigma) else loss)
        num_pairs += int(mask.sum())
    # Without any list an empty slice of the scores keeps the result connected to the graph.
    per_list = torch.stack(losses) if losses else scores[:0]
    if reduction == "none":
        return per_list
    return per_list.sum() / _divisor(reduction, num_pairs, len(losses))


def forward(
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
    """The backend contract: the loss, () or (Q,), dL/dscores (N,), and the number of pairs.

    Loss and gradient, for an upstream one of 1, are in fp32 or, for fp64 scores, fp64; the number
    is of all lists, () int64. The gradient is the closed form, since autograd does not record below
    the dispatcher.

    Raises:
        ValueError: offsets that do not rise from 0 to N.
    """
    ragged.check_offsets(offsets, scores.shape[0])
    compute_dtype = torch.promote_types(scores.dtype, torch.float32)
    scores, labels, bounds = scores.to(compute_dtype), labels.to(compute_dtype), offsets.tolist()
    scale = 1 / math.log(2) if reduction_log == "binary" else 1.0
    losses, grads, num_pairs = [], [scores[:0]], 0
    for start, stop in pairwise(bounds):
        s, y = scores[start:stop], labels[start:stop]
        mask, weights, differences = _weighted_differences(s, y, scheme=scheme, k=k, mu=mu, eps=eps)
        num_pairs += int(mask.sum())
        if diverged(s, y, sigma):
            losses.append(s.new_tensor(torch.nan))
            grads.append(torch.full_like(s, torch.nan))
            continue
        log_probabilities = torch.nn.functional.logsigmoid(sigma * differences)
        losses.append(-scale * (weights * log_probabilities)[mask].sum())
        pull = torch.zeros_like(differences)
        pull[mask] = (weights * torch.sigmoid(-sigma * differences))[mask]
        # Differences first: NDCGLoss1's pairs (i, i) then cancel without rounding what is small
        # beside them.
        grads.append(-scale * sigma * (pull - pull.t()).sum(dim=1))
    per_list, grad = torch.stack(losses) if losses else scores[:0].clone(), torch.cat(grads)
    pairs = torch.tensor(num_pairs, device=scores.device)
    if reduction == "none":
        return per_list, grad, pairs
    divisor = _divisor(reduction, num_pairs, len(losses))
    return per_list.sum() / divisor, grad / divisor, pairs
