"""RankNet: the logistic loss of preference pairs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from rerank_fast.objectives.base import Objective, ObjectiveSum
from rerank_fast.objectives.lambda_loss import LambdaLoss
from rerank_fast.ops.choices import BatchReduction, ReductionLog


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
        reduction: the mean over a batch's "pairs" or its "lists", or its "sum".
    """

    k: int | None = None
    sigma: float = 1.0
    reduction_log: ReductionLog = "binary"
    reduction: BatchReduction = "pairs"

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
        _ = self._pairs  # which checks the options

    @functools.cached_property
    def _pairs(self) -> LambdaLoss:
        return LambdaLoss("none", **self.describe())

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        return self._pairs(scores, labels, offsets)

    def num_units(self, labels: np.ndarray, offsets: np.ndarray) -> int | None:
        return self._pairs.num_units(labels, offsets)

    @property
    def cut_by_rank(self) -> bool:
        return self._pairs.cut_by_rank

    @property
    def unit(self) -> str:
        return self._pairs.unit

    def contributes(self, labels: np.ndarray) -> bool:
        return self._pairs.contributes(labels)
