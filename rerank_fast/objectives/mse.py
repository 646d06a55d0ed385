"""Mean squared error of scores: pointwise distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn.functional import mse_loss

from rerank_fast.objectives.base import ObjectiveSum
from rerank_fast.objectives.segments import flat
from rerank_fast.objectives.units import PerDocument, advice_on_binary


@dataclass(frozen=True)
class MSE(PerDocument):
    """Squared error of scores s and labels y, which are a teacher's scores.

    The sum of (s_i - y_i)^2 over documents; Hofstätter et al., "Improving Efficient Neural Ranking
    Models with Cross-Architecture Knowledge Distillation", 2020 (arXiv:2010.02666). Units are
    documents; sentence-transformers' MSELoss is the default. Scores are fitted as they are: labels
    between 0 and 1 want scores that end between 0 and 1. Ties mean nothing here.

    Args:
        reduction: "documents" is the mean over all documents of a batch; "list_means" first takes
            each list's mean and then theirs.
    """

    name: ClassVar[str] = "mse"
    citation: ClassVar[str] = """
@misc{hofstatter2020improving,
    title={Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
        Distillation},
    author={Hofst{\\"a}tter, Sebastian and Althammer, Sophia and Schr{\\"o}der, Michael
        and Sertkan, Mete and Hanbury, Allan},
    year={2020},
    eprint={2010.02666},
    archivePrefix={arXiv}
}
"""
    zero_is_irrelevant: ClassVar[bool] = False

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        _, y, lists = flat(scores, labels, offsets)
        error = mse_loss(scores.to(y.dtype), y, reduction="none")
        return ObjectiveSum(self.weigh(error, lists).sum())

    def advice(self, labels: np.ndarray) -> str | None:
        return advice_on_binary(self.name, labels)
