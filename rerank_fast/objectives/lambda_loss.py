"""LambdaLoss: preference pairs, weighted by what they mean to NDCG."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from torch import Tensor

from rerank_fast.objectives.base import Objective, ObjectiveSum
from rerank_fast.objectives.weighting import (
    Weighting,
    describe_weighting,
    fused_scheme,
    takes_every_ordered_pair,
    weighted_sum,
)
from rerank_fast.ops.choices import BatchReduction, ReductionLog, Scheme
from rerank_fast.ops.lambda_loss import count_pairs, summed_lambda_loss
from rerank_fast.ops.options import check_choice, check_cut, check_number, check_positive


@dataclass(frozen=True)
class LambdaLoss(Objective):
    """LambdaLoss (Wang et al., CIKM 2018), in one fused pass over the preference pairs.

    Args:
        scheme: weighting of a pair: "none", "ndcg1", "ndcg2", "lambdarank" or "ndcg2pp"; or a
            module or function of (gain, discount, true_sorted), as in sentence-transformers, for
            which pairs lie in padded (Q, D, D) tensors unless it is one of those five.
        k: count pairs with at least one document ranked in the top k; None or 0 counts all.
        sigma: slope of the sigmoid, above 0.
        mu: share of NDCGLoss2 beside LambdaRank in "ndcg2pp", at least 0.
        eps: least ideal DCG, above 0.
        reduction_log: "binary" (log2) or "natural".
        reduction: mean over the batch's "pairs" or its "lists", or its "sum".

    Raises:
        ValueError: an option that is none.
    """

    scheme: Scheme | Weighting = "ndcg2pp"
    k: int | None = None
    sigma: float = 1.0
    mu: float = 10.0
    eps: float = 1e-10
    reduction_log: ReductionLog = "binary"
    reduction: BatchReduction = "pairs"

    name: ClassVar[str] = "lambda_loss"
    idle: ClassVar[str] = "without a preference pair (all labels equal)"
    citation: ClassVar[str] = """@inproceedings{wang2018lambdaloss,
    title = {The LambdaLoss Framework for Ranking Metric Optimization},
    author = {Wang, Xuanhui and Li, Cheng and Golbandi, Nadav and Bendersky, Michael and
              Najork, Marc},
    booktitle = {Proceedings of the 27th ACM International Conference on
                 Information and Knowledge Management},
    pages = {1313--1322},
    year = {2018}
}"""

    def __post_init__(self) -> None:
        if callable(self.scheme):
            fused = fused_scheme(self.scheme)
            if fused is not None:
                object.__setattr__(self, "mu", float(getattr(self.scheme, "mu", self.mu)))
                object.__setattr__(self, "scheme", fused)
        else:
            check_choice("scheme", self.scheme, get_args(Scheme))
        check_choice("reduction_log", self.reduction_log, get_args(ReductionLog))
        check_choice("reduction", self.reduction, get_args(BatchReduction))
        check_cut(self.k)
        check_positive("sigma", self.sigma)
        check_positive("eps", self.eps)
        check_number("mu", self.mu, least=0)

    @property
    def _every_pair(self) -> bool:
        if callable(self.scheme):
            return takes_every_ordered_pair(self.scheme)
        return self.scheme == "ndcg1"

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        options: dict[str, Any] = {
            "sigma": self.sigma,
            "eps": self.eps,
            "reduction_log": self.reduction_log,
        }
        if callable(self.scheme):
            sizes = offsets.diff().tolist()  # a wait for the device, which a scheme's padding costs
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            total, count = weighted_sum(
                self.scheme, scores, labels, sizes, k=self.k or 0, **options
            )
            pairs = torch.tensor(count, device=scores.device)
        else:
            options |= {"scheme": self.scheme, "mu": self.mu, "k": self.k}
            total, pairs = summed_lambda_loss(scores, labels, offsets, **options)
        return ObjectiveSum(total, pairs if self.cut_by_rank else None)

    def num_units(self, labels: np.ndarray, offsets: np.ndarray) -> int | None:
        if self.reduction != "pairs":
            return len(offsets) - 1 if self.reduction == "lists" else None
        values = torch.from_numpy(labels)
        scheme: Scheme = "ndcg1" if self._every_pair else "none"
        return int(
            count_pairs(torch.zeros_like(values), values, torch.from_numpy(offsets), scheme=scheme)
        )

    @property
    def cut_by_rank(self) -> bool:
        return bool(self.k) and self.reduction == "pairs"

    @property
    def unit(self) -> str:
        return {"pairs": "preference pairs", "lists": "lists", "sum": ""}[self.reduction]

    @property
    def scores_idle(self) -> bool:
        return self._every_pair  # a document alone is a pair with itself

    def contributes(self, labels: np.ndarray) -> bool:
        if self._every_pair:
            return len(labels) > 1
        return len(labels) > 1 and bool(np.max(labels) > np.min(labels))

    def describe(self) -> dict[str, Any]:
        if callable(self.scheme):
            own = {field.name: getattr(self, field.name) for field in fields(self)}
            return {**own, "scheme": describe_weighting(self.scheme)}
        return asdict(self)
