"""Weighting schemes of LambdaLoss: sentence-transformers' names, and how the fused loss knows them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rerank_fast.ops.lambda_loss import Scheme
from rerank_fast.ops.options import check_number
from rerank_fast.ops.reference import pair_weights


class BaseWeightingScheme(nn.Module):
    """Weights of the pairs of a batch. Subclass it for a weighting of your own.

    A subclass that sets `scheme` to one of the names of `rerank_fast.lambda_loss` runs fused; any other
    runs through its `forward` in eager PyTorch.
    """

    scheme: Scheme | None = None

    def forward(self, gain: Tensor, discount: Tensor, true_sorted: Tensor) -> Tensor:
        """Weights of all ordered pairs, broadcastable to (Q, D, D), documents in the order of their scores.

        Args:
            gain: (Q, D) normalised gains.
            discount: (1, D) discounts log2(1 + rank).
            true_sorted: (Q, D) labels, at least 0; 0 in padding.
        """
        if self.scheme is None:
            raise NotImplementedError(f"{type(self).__name__} must implement forward(gain, discount, true_sorted)")
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


def fused_scheme(weighting_scheme: nn.Module) -> Scheme | None:
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


def takes_every_ordered_pair(weighting_scheme: nn.Module) -> bool:
    """Whether a scheme is, or inherits from, NDCGLoss1 (ours or sentence-transformers')."""
    return any(
        base is NDCGLoss1Scheme or (base.__module__ == _PEER_MODULE and base.__name__ == "NDCGLoss1Scheme")
        for base in type(weighting_scheme).__mro__
    )
