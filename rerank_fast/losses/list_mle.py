"""ListMLE and its position-aware form: the likelihood of the documents' order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rerank_fast.losses.lists import LabelledListsLoss
from rerank_fast.losses.scoring import fullname
from rerank_fast.objectives.listmle import ListMLE
from rerank_fast.objectives.plistmle import PListMLE
from rerank_fast.objectives.segments import Segments
from rerank_fast.ops.options import check_flag


class PListMLELambdaWeight(nn.Module):
    """Weights of the places of lists; by default 2^(D - r) - 1 of place r of a list of D documents.

    Args:
        rank_discount_fn: gives the weights in its place, as `forward` does.
    """

    def __init__(self, rank_discount_fn: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.rank_discount_fn = rank_discount_fn

    def forward(self, mask: Tensor) -> Tensor:
        """(Q, D) weights, at least 0, of the places under a (Q, D) mask; 0 elsewhere. Only their
        ratios count.
        """
        if self.rank_discount_fn is not None:
            return self.rank_discount_fn(mask)
        sizes = mask.sum(dim=1, keepdim=True)
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        # Divided by what keeps the sum of a long list finite.
        excess = (sizes - 127).clamp(min=0)
        return (torch.exp2(sizes - places - excess) - torch.exp2(-excess)) * mask


class PListMLELoss(LabelledListsLoss):
    """Position-aware ListMLE (Lan et al., UAI 2014) with sentence-transformers' signature and
    numbers.

    A batch in which no list has two documents gives a 0 that is part of the graph, with gradients
    of 0; there it is no part of it.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        lambda_weight: weights of the places of a list, ours, sentence-transformers', or any module
            with `forward(mask)`; None weighs all 1, which is ListMLE.
        activation_fn: applied to the logits before the loss.
        mini_batch_size: pairs per forward pass; None means the number of queries, or 32 with
            gradient_cache; below 0 all pairs.
        respect_input_order: take documents to be ordered by relevance, and do not read labels;
            False orders them by label, ties as they come.
        packed: run without padding where the model's architecture allows it; False calls the model
            itself.
        gradient_cache: bounded memory: one micro-batch's graph at a time, each run twice.

    Raises:
        ValueError: an option that is none, or a model with more than one output label.
    """

    _name = "PListMLELoss"

    def __init__(
        self,
        model: nn.Module,
        lambda_weight: nn.Module | None = PListMLELambdaWeight(),  # noqa: B008 - the peer's signature; it has no state
        activation_fn: nn.Module | None = nn.Identity(),  # noqa: B008
        mini_batch_size: int | None = None,
        respect_input_order: bool = True,
        *,
        packed: bool = True,
        gradient_cache: bool = False,
    ) -> None:
        check_flag("respect_input_order", respect_input_order)
        if lambda_weight is not None and not callable(lambda_weight):
            raise ValueError(f"lambda_weight must be None or a module, got {lambda_weight!r}")
        super().__init__(
            model,
            activation_fn,
            mini_batch_size=mini_batch_size,
            packed=packed,
            gradient_cache=gradient_cache,
        )
        self.lambda_weight = lambda_weight
        self.respect_input_order = respect_input_order
        self.eps = 1e-10

    def _loss(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> Tensor:
        return self._objective()(scores, labels, offsets).total / (len(offsets) - 1)

    def _objective(self) -> ListMLE:
        if self.lambda_weight is None:
            return ListMLE(self.respect_input_order)
        if _is_default(self.lambda_weight):
            return PListMLE(self.respect_input_order)
        return _WeighedListMLE(self.respect_input_order, self.lambda_weight, self.eps)

    def get_config_dict(self) -> dict[str, Any]:
        """The loss parameters, for a model card."""
        return {
            "lambda_weight": None if self.lambda_weight is None else fullname(self.lambda_weight),
            "activation_fn": fullname(self.activation_fn),
            "mini_batch_size": self.mini_batch_size,
            "respect_input_order": self.respect_input_order,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return PListMLE.citation


class ListMLELoss(PListMLELoss):
    """ListMLE (Xia et al., ICML 2008) with sentence-transformers' signature and numbers.

    A batch in which no list has two documents gives a 0 that is part of the graph, with gradients
    of 0; there it is no part of it.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        activation_fn: applied to the logits before the loss.
        mini_batch_size: pairs per forward pass; None means the number of queries, or 32 with
            gradient_cache; below 0 all pairs.
        respect_input_order: take documents to be ordered by relevance, and do not read labels;
            False orders them by label, ties as they come.
        packed: run without padding where the model's architecture allows it; False calls the model
            itself.
        gradient_cache: bounded memory: one micro-batch's graph at a time, each run twice.

    Raises:
        ValueError: an option that is none, or a model with more than one output label.
    """

    def __init__(
        self,
        model: nn.Module,
        activation_fn: nn.Module | None = nn.Identity(),  # noqa: B008
        mini_batch_size: int | None = None,
        respect_input_order: bool = True,
        *,
        packed: bool = True,
        gradient_cache: bool = False,
    ) -> None:
        super().__init__(
            model,
            None,
            activation_fn,
            mini_batch_size,
            respect_input_order,
            packed=packed,
            gradient_cache=gradient_cache,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The loss parameters, for a model card."""
        config = super().get_config_dict()
        del config["lambda_weight"]
        return config

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return ListMLE.citation


# sentence-transformers' own object is known by name, so that it need not be installed.
_PEER = "sentence_transformers.cross_encoder.losses.plist_mle.PListMLELambdaWeight"


def _is_default(lambda_weight: nn.Module) -> bool:
    """Whether the weights are PListMLE's own."""
    known = type(lambda_weight) is PListMLELambdaWeight or fullname(lambda_weight) == _PEER
    return known and lambda_weight.rank_discount_fn is None


@dataclass(frozen=True)
class _WeighedListMLE(ListMLE):
    """ListMLE with weights of places that a module gives."""

    weighting: nn.Module = nn.Identity()  # noqa: RUF009 - always given
    eps: float = 0.0

    def weights(self, lists: Segments) -> Tensor:
        places = torch.arange(int(lists.sizes.max()), device=lists.sizes.device)
        mask = places < lists.sizes[:, None]
        weights = self.weighting(mask).detach()
        weights = weights / (weights.sum(dim=1, keepdim=True) + self.eps)
        return weights.expand_as(mask)[mask].double()
