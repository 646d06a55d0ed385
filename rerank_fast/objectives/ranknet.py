"""RankNet: the logistic loss of preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rerank_fast.objectives.base import Objective, ObjectiveSum
from rerank_fast.ops.lambda_loss import ReductionLog, count_pairs, lambda_loss
from rerank_fast.ops.options import check_choice, check_cut, check_positive

PairReduction = Literal["pairs", "lists"]


@dataclass(frozen=True)
class RankNet(Objective):
    """-log sigmoid(sigma (s_i - s_j)) of each preference pair, y_i > y_j: LambdaLoss unweighted.

    Burges et al., "Learning to Rank using Gradient Descent", ICML 2005. Units are preference pairs;
    sentence-transformers' RankNetLoss is the default. Tied labels are no pair; tied scores cost
    log 2 a pair, and rank in the order of the input where k cuts.

    Args:
        k: count pairs with at least one document ranked in the top k; None or 0 counts all.
        sigma: slope of the sigmoid, above 0.
        reduction_log: "binary" (log2) or "natural".
        reduction: the mean over a batch's "pairs", or the sum over them by its "lists".
    """

    k: int | None = None
    sigma: float = 1.0
    reduction_log: ReductionLog = "binary"
    reduction: PairReduction = "pairs"

    name: ClassVar[str] = "ranknet"
    citation: ClassVar[str] = """
@inproceedings{burges2005learning,
    title={Learning to Rank using Gradient Descent},
    author={Burges, Chris and Shaked, Tal and Renshaw, Erin and Lazier, Ari and Deeds, Matt
        and Hamilton, Nicole and Hullender, Greg},
    booktitle={Proceedings of the 22nd International Conference on Machine Learning},
    pages={89--96},
    year={2005}
}
"""
    idle: ClassVar[str] = "without a preference pair (all labels equal)"

    def __post_init__(self) -> None:
        check_cut(self.k)
        check_positive("sigma", self.sigma)
        check_choice("reduction_log", self.reduction_log, get_args(ReductionLog))
        check_choice("reduction", self.reduction, get_args(PairReduction))

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        total = lambda_loss(
            scores,
            labels,
            offsets,
            scheme="none",
            k=self.k,
            sigma=self.sigma,
            reduction_log=self.reduction_log,
            reduction="sum",
        )
        if not self.cut_by_rank:
            return ObjectiveSum(total)
        return ObjectiveSum(total, count_pairs(scores, labels, offsets, scheme="none", k=self.k))

    def num_units(self, labels: np.ndarray, offsets: np.ndarray) -> int:
        if self.reduction == "lists":
            return len(offsets) - 1
        values = torch.from_numpy(labels)
        return int(count_pairs(values.float(), values, torch.from_numpy(offsets), scheme="none"))

    @property
    def cut_by_rank(self) -> bool:
        return bool(self.k) and self.reduction == "pairs"

    @property
    def unit(self) -> str:
        return "preference pairs" if self.reduction == "pairs" else "lists"

    def contributes(self, labels: np.ndarray) -> bool:
        return len(labels) > 1 and bool(labels.min() < labels.max())
