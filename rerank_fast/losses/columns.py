"""Losses of columns of texts: an anchor, or query, in the first, documents in the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rerank_fast.losses.scoring import PairScoringLoss
from rerank_fast.model.texts import check_input


class ColumnsLoss(PairScoringLoss):
    """A loss of the pairs of an anchor with the text of each other column in its row.

    Raises:
        ValueError: an option that is none, or a model that is no CrossEncoder with one output
            label.
    """

    def __init__(self, model: nn.Module, activation_fn: nn.Module | None, **execution: Any) -> None:
        super().__init__(model, activation_fn, **execution)
        if not _is_cross_encoder(model):
            raise ValueError(
                f"{type(self).__name__} expects a model of type CrossEncoder, "
                f"but got a model of type {type(model)}."
            )
        if self.model.num_labels != 1:
            raise ValueError(
                f"{type(self).__name__} expects a model with 1 output label, "
                f"but got a model with {self.model.num_labels} output labels."
            )

    def _score_columns(
        self,
        anchors: Sequence[Any],  # B
        columns: Sequence[Sequence[Any]],  # C, of B each
        *,
        prompt: str | None,
        task: str | None,
        progress: Callable[[int], object] = lambda num_pairs: None,
    ) -> Tensor:
        """(C, B) fp32 scores, activated, of each anchor with its row's text in each column."""
        pairs = [pair for column in columns for pair in zip(anchors, column, strict=True)]
        scores = self._score(pairs, prompt=prompt, task=task, progress=progress)
        return scores.view(len(columns), len(anchors))


def check_columns(name: str, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """A batch's columns as lists; texts are checked.

    Raises:
        ValueError: columns of different lengths, or of none, a text that is not valid Unicode, or a
            number, bytes or None in place of one; names the column and the row.
    """
    lengths = [len(column) for column in inputs]
    if len(set(lengths)) > 1:
        raise ValueError(f"{name} expects columns of one length, but got {lengths} rows.")
    if not any(lengths):
        raise ValueError(f"{name} got a batch without any row.")
    return [
        [check_input(value, f"column {c}, row {r}") for r, value in enumerate(column)]
        for c, column in enumerate(inputs)
    ]


def _is_cross_encoder(model: nn.Module) -> bool:
    """Whether a model is, or inherits from, a CrossEncoder of ours or of sentence-transformers."""
    packages = ("rerank_fast", "sentence_transformers")
    return any(
        kind.__name__ == "CrossEncoder" and kind.__module__.split(".")[0] in packages
        for kind in type(model).__mro__
    )
