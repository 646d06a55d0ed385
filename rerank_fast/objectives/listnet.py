"""ListNet: the softmax of labels against the softmax of scores; listwise distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rerank_fast.objectives.base import ObjectiveSum
from rerank_fast.objectives.gradient import with_gradient
from rerank_fast.objectives.segments import flat
from rerank_fast.objectives.units import PerList
from rerank_fast.ops.options import check_flag, check_positive


@dataclass(frozen=True)
class ListNet(PerList):
    """Cross-entropy of a list's label distribution and its score distribution (top-one ListNet).

    -sum_i p_i log q_i with p = softmax(labels / label_temperature) and q = softmax(scores /
    temperature) over the list; Cao et al., "Learning to Rank: From Pairwise Approach to Listwise
    Approach", ICML 2007. With a teacher's scores as labels this is KL distillation: it differs from
    KL(p || q) by p's entropy -sum_i p_i log p_i, which no score changes. Units are lists;
    sentence-transformers' ListNetLoss is the default. Tied labels have equal probability.

    Args:
        temperature: of the scores, above 0; lower ones sharpen q, and raise gradients by 1 / it.
        label_temperature: of the labels, above 0; lower ones sharpen p.
        kl: subtract p's entropy: the gradient stays, the loss is 0 where q is p.
    """

    temperature: float = 1.0
    label_temperature: float = 1.0
    kl: bool = False

    name: ClassVar[str] = "listnet"
    citation: ClassVar[str] = """
@inproceedings{cao2007learning,
    title={Learning to Rank: From Pairwise Approach to Listwise Approach},
    author={Cao, Zhe and Qin, Tao and Liu, Tie-Yan and Tsai, Ming-Feng and Li, Hang},
    booktitle={Proceedings of the 24th International Conference on Machine Learning},
    pages={129--136},
    year={2007}
}
"""

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_positive("label_temperature", self.label_temperature)
        check_flag("kl", self.kl)

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        s, y, lists = flat(scores, labels, offsets)
        log_q = lists.log_softmax(s / self.temperature)
        log_p = lists.log_softmax(y / self.label_temperature)
        p = log_p.exp()
        total = torch.dot(p, log_p - log_q if self.kl else -log_q)
        return ObjectiveSum(with_gradient(scores, total, (log_q.exp() - p) / self.temperature))
