"""What most losses are divided by: lists, or documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from torch import Tensor

from rerank_fast.objectives.base import Objective
from rerank_fast.objectives.segments import Segments
from rerank_fast.ops.options import check_choice

DocumentReduction = Literal["documents", "list_means"]


@dataclass(frozen=True)
class PerList(Objective):
    """A loss that is one number a list: a batch has the mean over its lists.

    Lists that give nothing count as lists, so that each weighs the same in every batch.
    """

    idle: ClassVar[str] = "of fewer than two documents"

    def num_units(self, labels: np.ndarray, offsets: np.ndarray) -> int:
        return len(offsets) - 1

    @property
    def unit(self) -> str:
        return "lists"

    def contributes(self, labels: np.ndarray) -> bool:
        return len(labels) > 1


@dataclass(frozen=True)
class PerDocument(Objective):
    """A loss that is a sum of one number a document.

    Args:
        reduction: "documents" is the mean over all documents of a batch; "list_means" first takes
            each list's mean and then theirs, so that a short list weighs as much as a long one.
    """

    reduction: DocumentReduction = "documents"

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, get_args(DocumentReduction))

    def num_units(self, labels: np.ndarray, offsets: np.ndarray) -> int:
        return len(labels) if self.reduction == "documents" else len(offsets) - 1

    @property
    def unit(self) -> str:
        return "documents" if self.reduction == "documents" else "lists"

    def weigh(
        self,
        values: Tensor,  # (N,)
        lists: Segments,
    ) -> Tensor:
        """(N,): values of documents with what each of them weighs in the sum."""
        if self.reduction == "documents":
            return values
        return values / lists.each(lists.sizes).to(values.dtype)


def advice_on_binary(name: str, labels: np.ndarray) -> str | None:
    """What a loss that fits a teacher's scores says of labels that are all 0 or 1."""
    if not len(labels) or not np.isin(labels, (0, 1)).all():
        return None
    ones = int(np.count_nonzero(labels))
    return (
        f"all {len(labels):,} labels are 0 or 1 ({ones:,} are 1, {ones / len(labels):.1%}), but "
        f"{name} fits raw scores to labels as it finds them, which is meant for a teacher's "
        "scores: for labels of relevance take lambda_loss, binary_cross_entropy or infonce"
    )


def advice_on_scores(name: str, labels: np.ndarray) -> str | None:
    """What a loss that reads labels as relevance says of labels below 0."""
    below = int(np.count_nonzero(labels < 0))
    if not below:
        return None
    return (
        f"{below:,} of {len(labels):,} labels are below 0 (from {labels.min():.3g} to "
        f"{labels.max():.3g}), as a teacher's raw scores are, but to {name} a document is relevant "
        "where its label is above 0: to distil scores take mse, margin_mse or listnet"
    )
