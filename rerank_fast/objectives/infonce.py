"""InfoNCE: the softmax over a list, of its positives against its negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from rerank_fast.objectives.base import ObjectiveSum
from rerank_fast.objectives.gradient import with_gradient
from rerank_fast.objectives.segments import Segments, flat
from rerank_fast.objectives.units import PerList, advice_on_scores
from rerank_fast.ops.options import check_choice, check_positive

Positives = Literal["each", "any"]


@dataclass(frozen=True)
class InfoNCE(PerList):
    """Negative log-probability of a list's positives under the softmax of its scores.

    With z = scores / temperature, positives P (labels above 0) and negatives N (all others) of one
    list; van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018
    (arXiv:1807.03748). With one positive both forms are -log(exp(z_p) / sum over the list of
    exp(z)), sentence-transformers' MultipleNegativesRankingLoss without in-batch negatives: its
    scale is 1 / temperature, and the sigmoid that it applies by default is not part of this loss.
    Units are lists; one without a positive, or without a negative, gives 0. Tied labels are as good
    as each other.

    Args:
        temperature: above 0; lower ones stress the hardest negatives.
        positives: "each" is the mean over p in P of -log(exp(z_p) / (exp(z_p) + sum_N exp(z))), so
            that positives do not compete; "any" is -log(sum_P exp(z) / sum_{P and N} exp(z)), which
            one positive above all negatives satisfies.
    """

    temperature: float = 1.0
    positives: Positives = "each"

    name: ClassVar[str] = "infonce"
    citation: ClassVar[str] = """
@misc{oord2018representation,
    title={Representation Learning with Contrastive Predictive Coding},
    author={van den Oord, A{\\"a}ron and Li, Yazhe and Vinyals, Oriol},
    year={2018},
    eprint={1807.03748},
    archivePrefix={arXiv}
}
"""
    idle: ClassVar[str] = "without a positive and a negative"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_choice("positives", self.positives, get_args(Positives))

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        s, y, lists = flat(scores, labels, offsets)
        z = torch.add(s, y, alpha=0) / self.temperature  # a label that is NaN is seen in z
        run = _each if self.positives == "each" else _any
        total, gradient = run(z, y > 0, lists)
        # Of a list without a positive NaN is in the gradient alone.
        total = total + (0 * gradient).sum()
        return ObjectiveSum(with_gradient(scores, total, gradient / self.temperature))

    def contributes(self, labels: np.ndarray) -> bool:
        return bool((labels > 0).any() and (labels <= 0).any())

    def check(self, labels: np.ndarray) -> None:
        if len(labels) and not (labels > 0).any():
            raise ValueError(
                f"{self.name} takes lists with at least one positive, a label above 0, got "
                f"{len(labels)} labels of which the largest is {labels.max():g}"
            )

    def advice(self, labels: np.ndarray) -> str | None:
        return advice_on_scores(self.name, labels)


def _each(z: Tensor, positive: Tensor, lists: Segments) -> tuple[Tensor, Tensor]:
    negatives = lists.log_sum_exp(z.masked_fill(positive, -torch.inf))
    # How far each document is behind the negatives; at -inf there is neither loss nor pull.
    behind = lists.each(negatives) - z
    ahead = behind.masked_fill(~positive, -torch.inf)
    share = 1 / lists.each(lists.sum(positive.to(z.dtype))).clamp(min=1)
    pull = ahead.sigmoid() * share
    softmax = (-behind).masked_fill(positive, -torch.inf).exp()  # of the negatives
    return torch.dot(softplus(ahead), share), softmax * lists.each(lists.sum(pull)) - pull


def _any(z: Tensor, positive: Tensor, lists: Segments) -> tuple[Tensor, Tensor]:
    sides = (z.masked_fill(~positive, -torch.inf), z.masked_fill(positive, -torch.inf))
    positives, negatives = map(lists.log_sum_exp, sides)
    ahead = (negatives - positives).where(positives != -torch.inf, -torch.inf)
    of_positives = (sides[0] - lists.each(positives)).exp()  # softmax, 0 of others
    of_negatives = (sides[1] - lists.each(negatives)).exp()
    push = torch.where(positive, -of_positives, of_negatives)
    return softplus(ahead).sum(), push * lists.each(ahead.sigmoid())
