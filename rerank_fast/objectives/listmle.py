"""ListMLE: the likelihood of the labels' order under the Plackett-Luce model of the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerank_fast.objectives.base import ObjectiveSum
from rerank_fast.objectives.gradient import with_gradient
from rerank_fast.objectives.segments import Segments, flat
from rerank_fast.objectives.units import PerList
from rerank_fast.ops.options import check_flag


@dataclass(frozen=True)
class ListMLE(PerList):
    """Negative log-likelihood of the order of the labels, drawn document by document by softmax.

    -sum_r (s_r - log sum_{t >= r} exp(s_t)), s_r the score of the document at place r when a list
    is ordered by label; Xia et al., "Listwise Approach to Learning to Rank: Theory and Algorithm",
    ICML 2008. Units are lists. sentence-transformers' ListMLELoss takes lists to be ordered by
    relevance already: of such lists this is its loss, whatever respect_input_order.

    Tied labels keep the order of the input, which the loss then learns: a shuffled list of two
    grades mostly teaches an order that means nothing.

    Args:
        respect_input_order: take lists to be ordered by relevance, the best document first, and do
            not read labels.
    """

    respect_input_order: bool = False

    name: ClassVar[str] = "listmle"
    citation: ClassVar[str] = """
@inproceedings{xia2008listwise,
    title={Listwise Approach to Learning to Rank: Theory and Algorithm},
    author={Xia, Fen and Liu, Tie-Yan and Wang, Jue and Zhang, Wensheng and Li, Hang},
    booktitle={Proceedings of the 25th International Conference on Machine Learning},
    pages={1192--1199},
    year={2008}
}
"""

    def __post_init__(self) -> None:
        check_flag("respect_input_order", self.respect_input_order)

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        s, y, lists = flat(scores, labels, offsets)
        if not len(s):
            return ObjectiveSum(with_gradient(scores, s.sum(), s))
        seen = lists.unlike_numbers(s if self.respect_input_order else s + y)
        order = None if self.respect_input_order else lists.order(y)
        weights = self.weights(lists).where(lists.each(lists.sizes) > 1, 0)
        total, gradient = plackett_luce(s if order is None else s[order], weights, lists)
        if order is not None:
            gradient = torch.empty_like(gradient).index_copy_(0, order, gradient)
        seen = seen.to(gradient.dtype)
        total, gradient = total + seen.sum(), gradient + lists.each(seen)
        return ObjectiveSum(with_gradient(scores, total.to(s.dtype), gradient.to(s.dtype)))

    def weights(self, lists: Segments) -> Tensor:
        """(N,) fp64, at least 0: what the document drawn at each place of a list weighs."""
        return torch.ones(lists.num_documents, dtype=torch.float64, device=lists.offsets.device)


def plackett_luce(
    scores: Tensor,  # (N,)
    weights: Tensor,  # (N,) fp64
    lists: Segments,
) -> tuple[Tensor, Tensor]:
    """-sum_r w_r (s_r - log sum_{t >= r} exp(s_t)) of lists in order, and its gradient, (N,).

    Both are fp64, the sum is over all lists. Scores that are not finite count as 0. A list's sums
    run over all lists, apart by so much that none adds to another's: no list is padded, and no
    device waited for.
    """
    s = scores.double()
    s = s.where(s.isfinite(), 0)
    apart = lists.of * (2 * s.abs().max() + 128)  # exp(-128 + log N) is nothing beside 2^-53
    behind = (s - apart).flip(0).logcumsumexp(0).flip(0) + apart
    log_likelihood = s - behind
    # Every place up to a document's own draws it down: exp(s_t) sum_{r <= t} w_r / exp(behind_r).
    before = (weights.log() - behind + apart).logcumsumexp(0) - apart
    gradient = (s + before).exp() - weights
    return -torch.dot(weights, log_likelihood), gradient.where(lists.each(lists.sizes) > 1, 0)
