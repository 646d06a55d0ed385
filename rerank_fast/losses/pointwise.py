"""Losses of single pairs, each with a number as its label: binary cross-entropy and the squared
error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rerank_fast.losses.columns import ColumnsLoss, check_columns
from rerank_fast.losses.scoring import fullname
from rerank_fast.model.texts import check_labels
from rerank_fast.model.tokens.packing import upload


class _PointwiseLoss(ColumnsLoss):
    """A loss of labelled pairs; a subclass defines `_loss`."""

    def forward(
        self,
        inputs: list[list[Any]],
        labels: Tensor,
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            inputs: [queries, documents], B texts each.
            labels: (B,) numbers.
            prompt: passed on to the model's preprocessing.
            task: passed on to the model's preprocessing.

        Raises:
            ValueError: inputs are not two columns of one length, labels are not one a pair, a text
                is not valid Unicode, or a number, bytes or None stands in place of one.
        """
        name = type(self).__name__
        if len(inputs) != 2:
            raise ValueError(
                f"{name} expects a dataset with two non-label columns, "
                f"but got a dataset with {len(inputs)} columns."
            )
        anchors, texts = check_columns(name, inputs)
        if not isinstance(labels, Tensor):
            labels = torch.tensor(check_labels(labels, "the labels"), dtype=torch.float32)
        if labels.numel() != len(anchors):
            raise ValueError(
                f"{name} expects {len(anchors)} labels (one per example), "
                f"but got {labels.numel()} labels with shape {tuple(labels.shape)}."
            )
        scores = self._score_columns(anchors, [texts], prompt=prompt, task=task)[0]
        return self._loss(scores, upload(labels.detach().reshape(-1).float(), scores.device))

    def _loss(
        self,
        scores: Tensor,  # (B,) fp32, activated
        labels: Tensor,  # (B,) fp32
    ) -> Tensor:
        raise NotImplementedError


class BinaryCrossEntropyLoss(_PointwiseLoss):
    """Binary cross-entropy of pairs with sentence-transformers' signature and numbers.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        activation_fn: applied to the logits before the loss.
        pos_weight: weight of a positive pair, as torch.tensor(4); None weighs all 1.
        mini_batch_size: pairs per forward pass; None leaves it to the package, or means 32 with
            gradient_cache; below 0 all pairs.
        packed: run without padding where the model's architecture allows it; False calls the model
            itself.
        gradient_cache: bounded memory: one micro-batch's graph at a time, each run twice.
        **kwargs: of torch.nn.BCEWithLogitsLoss.

    Raises:
        ValueError: an option that is none, or a model that is no CrossEncoder with one output
            label.
    """

    def __init__(
        self,
        model: nn.Module,
        activation_fn: nn.Module | None = nn.Identity(),  # noqa: B008 - the peer's signature; it has no state
        pos_weight: Tensor | None = None,
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
        self.pos_weight = pos_weight
        self.bce_with_logits_loss = nn.BCEWithLogitsLoss(pos_weight=pos_weight, **kwargs)

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.bce_with_logits_loss(scores, labels)

    def get_config_dict(self) -> dict[str, Any]:
        """The loss parameters, for a model card."""
        return {
            "activation_fn": fullname(self.activation_fn),
            "pos_weight": None if self.pos_weight is None else self.pos_weight.item(),
        }


class MSELoss(_PointwiseLoss):
    """The squared error of pairs' scores, as of a teacher's, with sentence-transformers' signature
    and numbers.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        activation_fn: applied to the logits before the loss; nn.Sigmoid() where the labels are from
            0 to 1.
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
        activation_fn: nn.Module | None = nn.Identity(),  # noqa: B008
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

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.loss_fct(scores, labels)

    def get_config_dict(self) -> dict[str, Any]:
        """The loss parameters, for a model card."""
        return {"activation_fn": fullname(self.activation_fn)}
