"""Mean squared error of score margins: pairwise distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rerank_fast.objectives.base import Objective, ObjectiveSum
from rerank_fast.objectives.gradient import with_gradient
from rerank_fast.objectives.mse import MSE
from rerank_fast.objectives.segments import Segments, flat
from rerank_fast.objectives.units import advice_on_binary
from rerank_fast.ops.options import check_choice

Pairs = Literal["positive", "all"]
PairReduction = Literal["pairs", "list_means"]


@dataclass(frozen=True)
class MarginMSE(Objective):
    """Squared error of margins between scores s and labels t, which are a teacher's scores.

    The sum of ((s_i - s_j) - (t_i - t_j))^2 over pairs of documents of one list; Hofstätter et
    al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation",
    2020 (arXiv:2010.02666). Units are pairs; a list of fewer than two documents has none. A
    constant between a list's scores and its labels costs nothing. Ties mean nothing here.

    Args:
        pairs: "positive" takes the list's first document against each of the others: the columns
            query, positive, negative_1, ... of sentence-transformers' MarginMSELoss, which it is.
            Of lists that are sampled (max_docs_per_list) a first document whose label is not above
            0 may be left out: take "all" there.
            "all" takes all D (D - 1) / 2 pairs of a list of D documents, whatever their order, in
            O(D): with d = s - t, of mean m, they add up to D times the sum of (d_i - m)^2.
        reduction: "pairs" is the mean over all pairs of a batch; "list_means" first takes each
            list's mean and then theirs.
    """

    pairs: Pairs = "positive"
    reduction: PairReduction = "pairs"

    name: ClassVar[str] = "margin_mse"
    citation: ClassVar[str] = MSE.citation
    zero_is_irrelevant: ClassVar[bool] = False
    idle: ClassVar[str] = "of fewer than two documents"

    def __post_init__(self) -> None:
        check_choice("pairs", self.pairs, get_args(Pairs))
        check_choice("reduction", self.reduction, get_args(PairReduction))

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        s, t, lists = flat(scores, labels, offsets)
        run = _against_the_first if self.pairs == "positive" else _all_pairs
        error, weight = run(s - t, lists)
        if self.reduction == "list_means":
            count = lists.sizes - 1
            if self.pairs == "all":
                count = count * lists.sizes / 2
            weight = weight / count.clamp(min=1)
        weighed = error * lists.each(weight)
        gradient = 2 * weighed
        if self.pairs == "positive" and len(s):
            # An empty list adds nothing to the document that its offset names.
            first = offsets[:-1].clamp(max=len(s) - 1)
            gradient.index_add_(0, first, lists.sum(gradient), alpha=-1)
        return ObjectiveSum(with_gradient(scores, torch.dot(weighed, error), gradient))

    def num_units(self, labels: np.ndarray, offsets: np.ndarray) -> int:
        if self.reduction == "list_means":
            return len(offsets) - 1
        sizes = np.diff(offsets)
        counts = np.maximum(sizes - 1, 0) if self.pairs == "positive" else sizes * (sizes - 1) // 2
        return int(counts.sum())

    @property
    def unit(self) -> str:
        return "pairs" if self.reduction == "pairs" else "lists"

    def contributes(self, labels: np.ndarray) -> bool:
        return len(labels) > 1

    def check(self, labels: np.ndarray) -> None:
        if self.pairs == "positive" and len(labels) < 2:
            raise ValueError(
                f"{self.name} takes lists of a positive, which comes first, and at least one "
                f"negative, got {len(labels)} document{'' if len(labels) == 1 else 's'}"
            )

    def advice(self, labels: np.ndarray) -> str | None:
        return advice_on_binary(self.name, labels)


def _against_the_first(difference: Tensor, lists: Segments) -> tuple[Tensor, Tensor]:
    """(N,) errors and (Q,) factors: each document's difference less its list's first one's."""
    if not len(difference):
        return difference, difference.new_ones(len(lists.sizes))
    first = difference[lists.offsets[:-1].clamp(max=len(difference) - 1)]
    return difference - lists.each(first), torch.ones_like(first)


def _all_pairs(difference: Tensor, lists: Segments) -> tuple[Tensor, Tensor]:
    """(N,) errors and (Q,) factors: each document's difference less its list's mean, and D."""
    sizes = lists.sizes.to(difference.dtype)
    mean = lists.sum(difference) / sizes
    return difference - lists.each(mean), sizes
