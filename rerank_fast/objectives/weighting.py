"""Weightings of LambdaLoss's preference pairs: the named ones, and any module with a forward of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rerank_fast.ops.choices import ReductionLog, Scheme
from rerank_fast.ops.options import check_number
from rerank_fast.ops.reference.lambda_loss import (
    discounts,
    diverged,
    normalized_gains,
    pair_mask,
    pair_weights,
    ranks,
)

# A module, or any function, of gains (Q, D), discounts (1, D) and labels (Q, D): see
# BaseWeightingScheme.forward.
Weighting: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


class BaseWeightingScheme(nn.Module):
    """Weights of the pairs of a batch. Subclass it for a weighting of your own.

    A subclass that sets `scheme` to one of the names of `rerank_fast.lambda_loss` runs fused; any
    other runs through its `forward` in eager PyTorch.
    """

    scheme: Scheme | None = None

    def forward(self, gain: Tensor, discount: Tensor, true_sorted: Tensor) -> Tensor:
        """Weights of all ordered pairs, broadcastable to (Q, D, D), documents in the order of their
        scores.

        Args:
            gain: (Q, D) normalised gains.
            discount: (1, D) discounts log2(1 + rank).
            true_sorted: (Q, D) labels, at least 0; 0 in padding.
        """
        if self.scheme is None:
            raise NotImplementedError(
                f"{type(self).__name__} must implement forward(gain, discount, true_sorted)"
            )
        rank = torch.arange(1, gain.shape[1] + 1, device=gain.device)
        mu = float(getattr(self, "mu", 0.0))
        return torch.stack([pair_weights(g, rank, scheme=self.scheme, mu=mu) for g in gain])


class NoWeightingScheme(BaseWeightingScheme):
    """Every pair weighs 1 (RankNet on preference pairs)."""

    scheme = "none"


class NDCGLoss1Scheme(BaseWeightingScheme):
    """NDCGLoss1: a bound looser than NDCGLoss2's, over all ordered pairs."""

    scheme = "ndcg1"


class NDCGLoss2Scheme(BaseWeightingScheme):
    """NDCGLoss2: a tighter bound of NDCG, by the distance of two ranks."""

    scheme = "ndcg2"


class LambdaRankScheme(BaseWeightingScheme):
    """LambdaRank: the change of NDCG when two documents swap places."""

    scheme = "lambdarank"


class NDCGLoss2PPScheme(BaseWeightingScheme):
    """NDCGLoss2++: mu * NDCGLoss2 + LambdaRank, the strongest in the LambdaLoss paper."""

    scheme = "ndcg2pp"

    def __init__(self, mu: float = 10.0) -> None:
        super().__init__()
        self.mu = check_number("mu", mu, least=0)


# sentence-transformers' own scheme objects are known by name, so that it need not be installed.
_PEER_MODULE = "sentence_transformers.cross_encoder.losses.lambda_loss"
_PEER_SCHEMES: dict[str, Scheme] = {
    "NoWeightingScheme": "none",
    "NDCGLoss1Scheme": "ndcg1",
    "NDCGLoss2Scheme": "ndcg2",
    "LambdaRankScheme": "lambdarank",
    "NDCGLoss2PPScheme": "ndcg2pp",
}


def fused_scheme(weighting_scheme: Weighting) -> Scheme | None:
    """The op's name of a weighting scheme; None for a custom one."""
    kind = type(weighting_scheme)
    if kind.__module__ == _PEER_MODULE:
        return _PEER_SCHEMES.get(kind.__name__)
    for base in kind.__mro__:
        # A subclass that overrides forward asks for its own weights, whatever name it inherits.
        if base is BaseWeightingScheme:
            return getattr(kind, "scheme", None)
        if "forward" in base.__dict__:
            return None
    return None


def takes_every_ordered_pair(weighting_scheme: Weighting) -> bool:
    """Whether a scheme is, or inherits from, NDCGLoss1 (ours or sentence-transformers')."""
    return any(
        base is NDCGLoss1Scheme
        or (base.__module__ == _PEER_MODULE and base.__name__ == "NDCGLoss1Scheme")
        for base in type(weighting_scheme).__mro__
    )


def describe_weighting(weighting_scheme: Weighting) -> str:
    """A scheme's class and its plain attributes, as own.Scheme(temperature=0.5); of a function its
    name.
    """
    kind: Any = (
        weighting_scheme if isinstance(weighting_scheme, FunctionType) else type(weighting_scheme)
    )
    plain = {
        name: value
        for name, value in vars(weighting_scheme).items()
        if isinstance(value, bool | int | float | str) and name != "training" and name[0] != "_"
    }
    options = ", ".join(f"{name}={value!r}" for name, value in plain.items())
    return f"{kind.__module__}.{kind.__qualname__}" + (f"({options})" if options else "")


def weighted_sum(
    weighting_scheme: Weighting,
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    sizes: list[int],  # of the Q lists
    *,
    k: int,
    sigma: float,
    eps: float,
    reduction_log: ReductionLog,
) -> tuple[Tensor, int]:
    """LambdaLoss with a weighting of the user's own, as the sum over pairs, and their number.

    In padded (Q, D, D) tensors, which is what its forward expects; the number is read on the host.
    """
    every_pair, width = takes_every_ordered_pair(weighting_scheme), max(sizes, default=0)
    gains, true_sorted, differences, masks = [], [], [], []
    seen = scores.sum() * 0  # or NaN, with NaN gradients for the lists that diverged
    if not width:
        return seen, 0
    seen = scores.new_zeros(())
    for s, y in zip(scores.split(sizes), labels.split(sizes), strict=True):
        padding = width - s.numel()
        if s.numel() == 0:
            gains.append(s.new_zeros(width))
            true_sorted.append(s.new_zeros(width))
            differences.append(s.new_zeros(width, width))
            masks.append(torch.zeros(width, width, dtype=torch.bool, device=s.device))
            continue
        seen = seen + (s * torch.where(diverged(s.detach(), y, sigma), torch.nan, 0.0)).sum()
        rank = ranks(s.detach())
        order = torch.argsort(rank)
        mask = pair_mask(y[order], rank[order], scheme="ndcg1" if every_pair else "none", k=k)
        gains.append(nn.functional.pad(normalized_gains(y, k, eps)[order], (0, padding)))
        true_sorted.append(nn.functional.pad(y[order].clamp(min=0), (0, padding)))
        difference = s[order][:, None] - s[order][None, :]
        differences.append(nn.functional.pad(difference, (0, padding, 0, padding)))
        masks.append(nn.functional.pad(mask, (0, padding, 0, padding)))
    discount = discounts(width, dtype=scores.dtype, device=scores.device)[None, :]
    weights = weighting_scheme(torch.stack(gains), discount, torch.stack(true_sorted))
    mask = torch.stack(masks)
    losses = (weights * nn.functional.logsigmoid(sigma * torch.stack(differences)))[mask]
    scale = 1 / math.log(2) if reduction_log == "binary" else 1.0
    return seen - scale * losses.sum(), losses.numel()
