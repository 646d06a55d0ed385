"""ApproxNDCG: NDCG of ranks that scores can be differentiated by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rerank_fast.objectives.base import ObjectiveSum
from rerank_fast.objectives.segments import flat
from rerank_fast.objectives.units import PerList, advice_on_scores
from rerank_fast.ops.approx_ranks import approx_ranks
from rerank_fast.ops.options import check_positive


@dataclass(frozen=True)
class ApproxNDCG(PerList):
    """1 - NDCG of approximate ranks: the metric itself, smoothed.

    1 - sum_i G_i / log2(1 + a_i) with gains G_i = (2^max(y_i, 0) - 1) / the ideal DCG of the list
    and a_i = 1 + sum over j != i of sigmoid(alpha (s_j - s_i)); Qin, Liu and Li, "A General
    Approximation Framework for Direct Optimization of Information Retrieval Measures", Information
    Retrieval 13, 2010. Units are lists; one without a label above 0 gives 0. Tied labels have one
    gain, and tied scores share the mean of their ranks.

    Args:
        alpha: how sharply approximate ranks follow scores, above 0: sharper ones are nearer to the
            metric and have a gradient in fewer places.
    """

    alpha: float = 10.0

    name: ClassVar[str] = "approx_ndcg"
    citation: ClassVar[str] = """
@article{qin2010general,
    title={A General Approximation Framework for Direct Optimization of Information Retrieval
        Measures},
    author={Qin, Tao and Liu, Tie-Yan and Li, Hang},
    journal={Information Retrieval},
    volume={13},
    number={4},
    pages={375--397},
    year={2010}
}
"""
    idle: ClassVar[str] = "without a label above 0"

    def __post_init__(self) -> None:
        check_positive("alpha", self.alpha)

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        _, y, lists = flat(scores, labels, offsets)
        relevance = y.clamp(min=0)
        largest = lists.each(lists.max(relevance))
        # Divided by 2^largest, as the ideal DCG is, so that a large label stays finite.
        gains = torch.exp2(relevance - largest) - torch.exp2(-largest)
        best_first = gains[lists.order(relevance)]
        ideal = lists.sum(best_first / torch.log2(1 + lists.positions().to(y.dtype)))
        found = gains / torch.log2(1 + approx_ranks(scores, offsets, alpha=self.alpha))
        # Of a list without a gain 0 / 1.
        share = found / lists.each(ideal.masked_fill(ideal == 0, 1))
        return ObjectiveSum((ideal != 0).sum() - share.sum())

    def contributes(self, labels: np.ndarray) -> bool:
        return len(labels) > 1 and bool((labels > 0).any())

    def advice(self, labels: np.ndarray) -> str | None:
        return advice_on_scores(self.name, labels)
