"""ADR-MSE: mean squared error of ranks, the first of them weighing most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rerank_fast.objectives.base import ObjectiveSum
from rerank_fast.objectives.segments import flat
from rerank_fast.objectives.units import PerDocument
from rerank_fast.ops.approx_ranks import approx_ranks
from rerank_fast.ops.options import check_positive


@dataclass(frozen=True)
class ADRMSE(PerDocument):
    """Approx Discounted Rank MSE: squared error of approximate ranks and those of the labels.

    The sum of (r_i - a_i)^2 / log2(1 + r_i) over documents, with r the rank of the label in its
    list, from the highest, and a_i = 1 + sum over j != i of sigmoid(alpha (s_j - s_i)); Schlatt et
    al., "Rank-DistiLLM: Closing the Effectiveness Gap Between Cross-Encoders and LLMs for Passage
    Re-ranking", ECIR 2025. It distils an order, as a language model gives it: of labels only their
    order counts. Units are documents; sentence-transformers' ADRMSELoss is the default. Tied labels
    share the mean of their ranks, as tied scores do.

    Args:
        reduction: "documents" is the mean over all documents of a batch; "list_means" first takes
            each list's mean and then theirs.
        alpha: how sharply approximate ranks follow scores, above 0.
    """

    alpha: float = 1.0

    name: ClassVar[str] = "adr_mse"
    citation: ClassVar[str] = """
@inproceedings{schlatt2025rankdistillm,
    title={Rank-{DistiLLM}: Closing the Effectiveness Gap Between Cross-Encoders and {LLM}s for
        Passage Re-ranking},
    author={Schlatt, Ferdinand and Fr{\\"o}be, Maik and Scells, Harrisen and Zhuang, Shengyao
        and Koopman, Bevan and Zuccon, Guido and Stein, Benno and Potthast, Martin
        and Hagen, Matthias},
    booktitle={Advances in Information Retrieval (ECIR 2025)},
    year={2025}
}
"""
    idle: ClassVar[str] = "of fewer than two documents"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("alpha", self.alpha)

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        _, y, lists = flat(scores, labels, offsets)
        ranks = lists.mean_ranks(y) + lists.each(lists.unlike_numbers(y))
        error = approx_ranks(scores, offsets, alpha=self.alpha) - ranks
        weight = self.weigh(1 / torch.log2(1 + ranks), lists)
        return ObjectiveSum((weight * error.square()).sum())

    def contributes(self, labels: np.ndarray) -> bool:
        return len(labels) > 1
