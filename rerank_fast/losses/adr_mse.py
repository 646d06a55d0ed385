"""ADR-MSE: the squared error of approximate ranks, for an order that a language model gave."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rerank_fast.losses.lists import LabelledListsLoss
from rerank_fast.losses.scoring import fullname
from rerank_fast.objectives.adr_mse import ADRMSE
from rerank_fast.ops.options import check_positive


class ADRMSELoss(LabelledListsLoss):
    """ADR-MSE (Schlatt et al., ECIR 2025) with sentence-transformers' signature and numbers.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        alpha: how sharply approximate ranks follow scores, above 0.
        activation_fn: applied to the logits before the loss.
        mini_batch_size: pairs per forward pass; None means the number of queries, or 32 with
            gradient_cache; below 0 all pairs.
        packed: run without padding where the model's architecture allows it; False calls the model
            itself.
        gradient_cache: bounded memory: one micro-batch's graph at a time, each run twice.

    Raises:
        ValueError: an option that is none, or a model with more than one output label.
    """

    _name = "ADRMSELoss"
    _labels_expected = (
        "expects `labels` to be a list of per-query Tensors (list[Tensor]), "
        "but got a single Tensor."
    )

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 1.0,
        activation_fn: nn.Module | None = nn.Identity(),  # noqa: B008 - the peer's signature; it has no state
        mini_batch_size: int | None = None,
        *,
        packed: bool = True,
        gradient_cache: bool = False,
    ) -> None:
        check_positive("alpha", alpha)
        super().__init__(
            model,
            activation_fn,
            mini_batch_size=mini_batch_size,
            packed=packed,
            gradient_cache=gradient_cache,
        )
        self.alpha = alpha

    def _loss(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> Tensor:
        return ADRMSE(alpha=self.alpha)(scores, labels, offsets).total / len(scores)

    def get_config_dict(self) -> dict[str, Any]:
        """The loss parameters, for a model card."""
        return {
            "alpha": self.alpha,
            "activation_fn": fullname(self.activation_fn),
            "mini_batch_size": self.mini_batch_size,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return ADRMSE.citation
