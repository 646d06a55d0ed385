"""ListNet: the softmax of labels against the softmax of scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rerank_fast.losses.lists import LabelledListsLoss
from rerank_fast.losses.scoring import fullname
from rerank_fast.objectives.listnet import ListNet


class ListNetLoss(LabelledListsLoss):
    """ListNet (Cao et al., ICML 2007) with sentence-transformers' signature and numbers.

    A list without documents has no share in the loss but counts as a list; there it makes the loss
    NaN.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        activation_fn: applied to the logits before the loss.
        mini_batch_size: pairs per forward pass; None means the number of queries, or 32 with
            gradient_cache; below 0 all pairs.
        packed: run without padding where the model's architecture allows it; False calls the model
            itself.
        gradient_cache: bounded memory: one micro-batch's graph at a time, each run twice.

    Raises:
        ValueError: an option that is none, or a model with more than one output label.
    """

    _name = "ListNetLoss"

    def __init__(
        self,
        model: nn.Module,
        activation_fn: nn.Module | None = nn.Identity(),  # noqa: B008 - the peer's signature; it has no state
        mini_batch_size: int | None = None,
        *,
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

    def _loss(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> Tensor:
        return ListNet()(scores, labels, offsets).total / (len(offsets) - 1)

    def get_config_dict(self) -> dict[str, Any]:
        """The loss parameters, for a model card."""
        return {
            "activation_fn": fullname(self.activation_fn),
            "mini_batch_size": self.mini_batch_size,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return ListNet.citation
