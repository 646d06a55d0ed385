"""PListMLE: ListMLE in which the first places weigh most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rerank_fast.objectives.listmle import ListMLE
from rerank_fast.objectives.segments import Segments


@dataclass(frozen=True)
class PListMLE(ListMLE):
    """Position-aware ListMLE: the negative log-likelihood of the labels' order, places weighed.

    -sum_r w_r (s_r - log sum_{t >= r} exp(s_t)), s_r the score of the document at place r when a
    list of D documents is ordered by label, and w_r = (2^(D - r) - 1) / sum_t (2^(D - t) - 1): each
    place weighs about half of the one before, and the last one nothing. Lan et al., "Position-Aware
    ListMLE: A Sequential Learning Process for Ranking", UAI 2014. Units are lists.
    sentence-transformers' PListMLELoss takes lists to be ordered by relevance already: of such
    lists this is its loss, whatever respect_input_order.

    Tied labels keep the order of the input, which the loss then learns.

    Args:
        respect_input_order: take lists to be ordered by relevance, the best document first, and do
            not read labels.
    """

    name: ClassVar[str] = "plistmle"
    citation: ClassVar[str] = """
@inproceedings{lan2014position,
    title={Position-Aware {ListMLE}: A Sequential Learning Process for Ranking},
    author={Lan, Yanyan and Zhu, Yadong and Guo, Jiafeng and Niu, Shuzi and Cheng, Xueqi},
    booktitle={Proceedings of the 30th Conference on Uncertainty in Artificial Intelligence},
    pages={449--458},
    year={2014}
}
"""

    def weights(self, lists: Segments) -> Tensor:
        """(N,) fp64: of each place of a list; 1 in all of a list of two or more."""
        sizes = lists.sizes.double()
        last = (-sizes).exp2()
        # Both divided by 2^D, so that a long list stays finite.
        whole = (1 - (1 + sizes) * last).clamp(min=1e-300)
        return ((-lists.positions().double()).exp2() - lists.each(last)) / lists.each(whole)
