"""Binary cross-entropy of scores: pointwise classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rerank_fast.objectives.base import ObjectiveSum
from rerank_fast.objectives.segments import flat
from rerank_fast.objectives.units import PerDocument
from rerank_fast.ops.options import check_positive


@dataclass(frozen=True)
class BinaryCrossEntropy(PerDocument):
    """Cross-entropy of labels y from 0 to 1 and the probabilities sigmoid(s) of raw scores s.

    The sum of -w y_i log sigmoid(s_i) - (1 - y_i) log(1 - sigmoid(s_i)) over documents; monoBERT's
    loss (Nogueira and Cho, "Passage Re-ranking with BERT", 2019, arXiv:1901.04085). Units are
    documents; sentence-transformers' BinaryCrossEntropyLoss is the default. Ties mean nothing here.

    Args:
        reduction: "documents" is the mean over all documents of a batch; "list_means" first takes
            each list's mean and then theirs.
        pos_weight: w, how much a relevant document weighs beside one that is not, above 0. As many
            as there are irrelevant documents to a relevant one evens both out.
    """

    pos_weight: float = 1.0

    name: ClassVar[str] = "binary_cross_entropy"
    citation: ClassVar[str] = """
@misc{nogueira2019passage,
    title={Passage Re-ranking with {BERT}},
    author={Nogueira, Rodrigo and Cho, Kyunghyun},
    year={2019},
    eprint={1901.04085},
    archivePrefix={arXiv}
}
"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("pos_weight", self.pos_weight)

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        _, y, lists = flat(scores, labels, offsets)
        # Filled on the device: a tensor of a Python number would be sent there.
        weight = None if self.pos_weight == 1 else y.new_full((), self.pos_weight)
        options: dict[str, Any] = {"pos_weight": weight, "reduction": "none"}
        loss = binary_cross_entropy_with_logits(scores.to(y.dtype), y, **options)
        return ObjectiveSum(self.weigh(loss, lists).sum())

    def check(self, labels: np.ndarray) -> None:
        outside = labels[~((labels >= 0) & (labels <= 1))]
        if len(outside):
            raise ValueError(
                f"{self.name} takes labels from 0 to 1, got {outside[0]:g}: grades want "
                "lambda_loss or listnet, a teacher's scores mse or margin_mse"
            )
