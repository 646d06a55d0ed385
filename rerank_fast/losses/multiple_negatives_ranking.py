"""The softmax over a positive and its negatives, some drawn from the batch (InfoNCE)."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rerank_fast.losses.columns import ColumnsLoss, check_columns
from rerank_fast.losses.scoring import fullname


class MultipleNegativesRankingLoss(ColumnsLoss):
    """The cross-entropy of the positive among negatives, with sentence-transformers' signature and
    numbers.

    Negatives from the batch are drawn, as there, by torch's generator of the host, before anything
    is scored. Dropout moves that generator, here otherwise than there: the draws of one seed are
    theirs as long as the model has none, and else others of the same distribution.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        num_negatives: texts of other rows that are drawn for each anchor; None takes all.
        scale: multiplies the activated scores; 0 leaves them.
        activation_fn: applied to the logits before the loss; None applies nothing.
        mini_batch_size: pairs per forward pass; None leaves it to the package, or means 32 with
            gradient_cache; below 0 all pairs.
        packed: run without padding where the model's architecture allows it; False calls the model
            itself.
        gradient_cache: bounded memory: one micro-batch's graph at a time, each run twice.

    Raises:
        ValueError: an option that is none, or a model that is no CrossEncoder with one output
            label.
    """

    def __init__(
        self,
        model: nn.Module,
        num_negatives: int | None = 4,
        scale: float = 10.0,
        activation_fn: nn.Module | None = nn.Sigmoid(),  # noqa: B008 - the peer's signature; it has no state
        *,
        mini_batch_size: int | None = None,
        packed: bool = True,
        gradient_cache: bool = False,
    ) -> None:
        super().__init__(
            model,
            activation_fn,
            mini_batch_size=mini_batch_size,
            packed=packed,
            gradient_cache=gradient_cache,
        )
        whole = isinstance(num_negatives, Integral) and not isinstance(num_negatives, bool)
        if num_negatives is not None and not (whole and num_negatives > 0):
            raise ValueError(
                f"num_negatives must be None or a whole number above 0, got {num_negatives!r}"
            )
        self.num_negatives = num_negatives
        self.scale = scale
        self.cross_entropy_loss = nn.CrossEntropyLoss()

    def get_in_batch_negatives(
        self, anchors: list[Any], candidates: list[list[Any]]
    ) -> list[list[Any]]:
        """Columns of texts of other rows, one for each negative that is drawn for an anchor.

        Args:
            anchors: B of them.
            candidates: columns of B texts; what stands in an anchor's own row is not drawn for it.
        """
        num_rows = len(anchors)
        texts = [text for column in candidates for text in column]
        others = ~torch.eye(num_rows, dtype=torch.bool).repeat(1, len(candidates))
        if self.num_negatives is not None and self.num_negatives < len(texts) - len(candidates):
            chosen = torch.multinomial(others.float(), self.num_negatives)
        else:
            chosen = others.nonzero()[:, 1].view(num_rows, -1)
        return [[texts[i] for i in column] for column in chosen.T.tolist()]

    def forward(
        self,
        inputs: list[list[Any]],
        labels: Tensor | None = None,
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            inputs: [anchors, positives, negatives, ...], B texts each, with any number of columns
                of negatives.
            labels: not looked at.
            prompt: passed on to the model's preprocessing.
            task: passed on to the model's preprocessing.

        Raises:
            ValueError: no column of positives, columns of different lengths, a text that is not
                valid Unicode, or a number, bytes or None in place of one.
        """
        name = type(self).__name__
        if len(inputs) < 2:
            raise ValueError(
                f"{name} expects an anchor and a positive column, but got a dataset with "
                f"{len(inputs)} columns."
            )
        anchors, positives, *negatives = check_columns(name, inputs)
        drawn = self.get_in_batch_negatives(anchors, [positives, *negatives])
        return self._loss(anchors, [positives, *drawn, *negatives], prompt=prompt, task=task)

    def _loss(
        self,
        anchors: list[Any],
        columns: list[list[Any]],
        *,
        prompt: str | None,
        task: str | None,
        progress: Callable[[int], object] = lambda num_pairs: None,
    ) -> Tensor:
        """The loss, (), of B anchors and columns of B texts, of which the first are the
        positives.
        """
        scores = self._score_columns(
            anchors, columns, prompt=prompt, task=task, progress=progress
        ).T
        if self.scale:
            scores = scores * self.scale
        return self.cross_entropy_loss(
            scores, torch.zeros(len(anchors), dtype=torch.long, device=scores.device)
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The loss parameters, for a model card."""
        return {
            "scale": self.scale,
            "num_negatives": self.num_negatives,
            "activation_fn": fullname(self.activation_fn),
        }


class CachedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss in bounded memory: its gradient_cache is on.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        num_negatives: texts of other rows that are drawn for each anchor; None takes all.
        scale: multiplies the activated scores; 0 leaves them.
        activation_fn: applied to the logits before the loss; None applies nothing.
        mini_batch_size: pairs per forward pass; below 0 all pairs.
        show_progress_bar: show one of the batch's pairs, each counted once a run.
        packed: run without padding where the model's architecture allows it; False calls the model
            itself.

    Raises:
        ValueError: an option that is none, or a model that is no CrossEncoder with one output
            label.
    """

    uses_gradient_cache = True  # asked by sentence-transformers' decorators of losses

    def __init__(
        self,
        model: nn.Module,
        num_negatives: int | None = 4,
        scale: float = 10.0,
        activation_fn: nn.Module | None = nn.Sigmoid(),  # noqa: B008
        mini_batch_size: int = 32,
        show_progress_bar: bool = False,
        *,
        packed: bool = True,
    ) -> None:
        super().__init__(
            model,
            num_negatives,
            scale,
            activation_fn,
            mini_batch_size=mini_batch_size,
            packed=packed,
            gradient_cache=True,
        )
        self.show_progress_bar = show_progress_bar

    def _loss(self, anchors: list[Any], columns: list[list[Any]], **options: Any) -> Tensor:
        total = len(anchors) * len(columns) * (2 if torch.is_grad_enabled() else 1)
        bar = tqdm(total=total, desc="Score pairs", disable=not self.show_progress_bar)
        return super()._loss(anchors, columns, progress=bar.update, **options)

    def get_config_dict(self) -> dict[str, Any]:
        """The loss parameters, for a model card."""
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}
