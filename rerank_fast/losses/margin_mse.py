"""MarginMSE: the squared error of score differences, as of a teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rerank_fast.losses.columns import ColumnsLoss, check_columns
from rerank_fast.losses.scoring import fullname
from rerank_fast.model.tokens.packing import upload
from rerank_fast.objectives.margin_mse import MarginMSE


class MarginMSELoss(ColumnsLoss):
    """MarginMSE (Hofstätter et al. 2020) with sentence-transformers' signature and numbers.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        activation_fn: applied to the logits before the loss; nn.Sigmoid() where the labels are
            differences of numbers from 0 to 1.
        mini_batch_size: pairs per forward pass; None leaves it to the package, or means 32 with
            gradient_cache; below 0 all pairs.
        packed: run without padding where the model's architecture allows it; False calls the model
            itself.
        gradient_cache: bounded memory: one micro-batch's graph at a time, each run twice.
        **kwargs: of torch.nn.MSELoss.

    Raises:
        ValueError: an option that is none, or a model that is no CrossEncoder with one output
            label.
    """

    def __init__(
        self,
        model: nn.Module,
        activation_fn: nn.Module | None = nn.Identity(),  # noqa: B008 - the peer's signature; it has no state
        *,
        mini_batch_size: int | None = None,
        packed: bool = True,
        gradient_cache: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            activation_fn,
            mini_batch_size=mini_batch_size,
            packed=packed,
            gradient_cache=gradient_cache,
        )
        self.loss_fct = nn.MSELoss(**kwargs)

    def forward(
        self,
        inputs: list[list[Any]],
        labels: Tensor | list[Any],
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            inputs: [queries, positives, negatives, ...], B texts each, with n >= 1 columns of
                negatives.
            labels: (B,) or (B, n) differences of the positive's score and each negative's, or
                (B, n + 1) scores of the positive and each negative; a list of tensors is stacked.
            prompt: passed on to the model's preprocessing.
            task: passed on to the model's preprocessing.

        Raises:
            ValueError: labels of another shape, no column of negatives, columns of different
                lengths, a text that is not valid Unicode, or a number, bytes or None in place of
                one.
        """
        name = type(self).__name__
        anchors, *columns = check_columns(name, inputs)
        if len(columns) < 2:
            raise ValueError(
                f"{name} expects an anchor, a positive and at least one negative column, "
                f"but got a dataset with {len(inputs)} columns."
            )
        if isinstance(labels, list):
            labels = torch.stack([torch.as_tensor(row) for row in labels])
        margins = _margins(labels, len(anchors), len(columns) - 1)
        scores = self._score_columns(anchors, columns, prompt=prompt, task=task)
        differences = (scores[0] - scores[1:]).T
        return self.loss_fct(differences, upload(margins.detach().float(), scores.device))

    def get_config_dict(self) -> dict[str, Any]:
        """The loss parameters, for a model card."""
        return {"activation_fn": fullname(self.activation_fn)}

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return MarginMSE.citation


def _margins(labels: Tensor, batch_size: int, num_negatives: int) -> Tensor:
    """(B, n) differences that the labels of a batch ask for."""
    expected = (batch_size, num_negatives)
    if labels.shape == (batch_size, num_negatives + 1):
        labels = labels[:, :1] - labels[:, 1:]
    elif labels.shape == (batch_size,):
        labels = labels[:, None]
    if labels.shape != expected:
        raise ValueError(
            f"Labels shape {labels.shape} does not match expected shape {expected}. Ensure that "
            "your dataset labels/scores are 1) lists of differences between positive scores and "
            "negatives scores (length `num_negatives`), or 2) lists of positive and negative "
            "scores (length `num_negatives + 1`)."
        )
    return labels
