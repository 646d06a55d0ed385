"""LambdaLoss, and RankNet, which is LambdaLoss with every preference pair weighing 1."""

from __future__ import annotations

from typing import get_args

from torch import Tensor, nn

from rerank_fast.losses.lists import LabelledListsLoss
from rerank_fast.losses.scoring import fullname
from rerank_fast.objectives.lambda_loss import LambdaLoss as LambdaObjective
from rerank_fast.objectives.ranknet import RankNet
from rerank_fast.objectives.weighting import (
    NDCGLoss2PPScheme,
    NoWeightingScheme,
    fused_scheme,
    weighted_sum,
)
from rerank_fast.ops.choices import ReductionLog
from rerank_fast.ops.lambda_loss import lambda_loss
from rerank_fast.ops.options import check_choice, check_cut, check_positive


class LambdaLoss(LabelledListsLoss):
    """LambdaLoss (Wang et al., CIKM 2018) with sentence-transformers' signature and numbers.

    Tokenises all pairs of the batch once, runs the model on micro-batches of similar length, and
    takes the loss and its gradient from one fused pass over the preference pairs.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        weighting_scheme: one of this module's schemes, one of sentence-transformers', or any module
            with `forward(gain, discount, true_sorted)`; None weighs every pair 1.
        k: count pairs with at least one document in the model's top k; None counts all.
        sigma: slope of the sigmoid, above 0.
        eps: least ideal DCG, above 0.
        reduction_log: "binary" or "natural".
        activation_fn: applied to the logits before the loss. What the model's predict applies to
            its scores stays the model's own, as in the Trainer.
        mini_batch_size: pairs per forward pass; None means the number of queries, or 32 with
            gradient_cache; below 0 all pairs.
        packed: run without padding where the model's architecture allows it; False calls the model
            itself.
        gradient_cache: bounded memory: one micro-batch's graph at a time, each run twice.

    Raises:
        ValueError: an option that is none, or a model with more than one output label.
    """

    _name = "LambdaLoss"

    def __init__(
        self,
        model: nn.Module,
        weighting_scheme: nn.Module | None = NDCGLoss2PPScheme(),  # noqa: B008 - the peer's signature; it has no state
        k: int | None = None,
        sigma: float = 1.0,
        eps: float = 1e-10,
        reduction_log: ReductionLog = "binary",
        activation_fn: nn.Module | None = nn.Identity(),  # noqa: B008
        mini_batch_size: int | None = None,
        packed: bool = True,
        *,
        gradient_cache: bool = False,
    ) -> None:
        check_cut(k)
        check_positive("sigma", sigma)
        check_positive("eps", eps)
        check_choice("reduction_log", reduction_log, get_args(ReductionLog))
        if weighting_scheme is not None and not callable(weighting_scheme):
            raise ValueError(f"weighting_scheme must be None or a module, got {weighting_scheme!r}")
        super().__init__(
            model,
            activation_fn,
            mini_batch_size=mini_batch_size,
            packed=packed,
            gradient_cache=gradient_cache,
        )
        self.weighting_scheme = weighting_scheme or NoWeightingScheme()
        self.k = k
        self.sigma = sigma
        self.eps = eps
        self.reduction_log: ReductionLog = reduction_log

    def _loss(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> Tensor:
        scheme = fused_scheme(self.weighting_scheme)
        if scheme is None:
            total, pairs = weighted_sum(
                self.weighting_scheme,
                scores,
                labels,
                offsets.diff().tolist(),
                k=self.k or 0,
                sigma=self.sigma,
                eps=self.eps,
                reduction_log=self.reduction_log,
            )
            return total / max(pairs, 1)
        return lambda_loss(
            scores,
            labels,
            offsets,
            scheme=scheme,
            # As in sentence-transformers, 0 means no cut.
            k=self.k or None,
            sigma=self.sigma,
            mu=float(getattr(self.weighting_scheme, "mu", 10.0)),
            eps=self.eps,
            reduction_log=self.reduction_log,
        )

    def get_config_dict(self) -> dict[str, float | int | str | None]:
        """The loss parameters, for a model card."""
        config: dict[str, float | int | str | None] = {
            "weighting_scheme": fullname(self.weighting_scheme),
            "k": self.k,
            "sigma": self.sigma,
            "eps": self.eps,
            "reduction_log": self.reduction_log,
            "activation_fn": fullname(self.activation_fn),
            "mini_batch_size": self.mini_batch_size,
        }
        if hasattr(self.weighting_scheme, "mu"):
            config["mu"] = float(self.weighting_scheme.mu)  # type: ignore[arg-type]
        return config

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return LambdaObjective.citation


class RankNetLoss(LambdaLoss):
    """RankNet (Burges et al., ICML 2005) with sentence-transformers' signature and numbers.

    LambdaLoss with every preference pair weighing 1.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder with one output label.
        k: count pairs with at least one document in the model's top k; None counts all.
        sigma: slope of the sigmoid, above 0.
        eps: of LambdaLoss; it changes nothing here.
        reduction_log: "binary" or "natural".
        activation_fn: applied to the logits before the loss.
        mini_batch_size: pairs per forward pass; None means the number of queries, or 32 with
            gradient_cache; below 0 all pairs.
        packed: run without padding where the model's architecture allows it; False calls the model
            itself.
        gradient_cache: bounded memory: one micro-batch's graph at a time, each run twice.

    Raises:
        ValueError: an option that is none, or a model with more than one output label.
    """

    def __init__(
        self,
        model: nn.Module,
        k: int | None = None,
        sigma: float = 1.0,
        eps: float = 1e-10,
        reduction_log: ReductionLog = "binary",
        activation_fn: nn.Module | None = nn.Identity(),  # noqa: B008
        mini_batch_size: int | None = None,
        *,
        packed: bool = True,
        gradient_cache: bool = False,
    ) -> None:
        super().__init__(
            model,
            NoWeightingScheme(),
            k=k,
            sigma=sigma,
            eps=eps,
            reduction_log=reduction_log,
            activation_fn=activation_fn,
            mini_batch_size=mini_batch_size,
            packed=packed,
            gradient_cache=gradient_cache,
        )

    def get_config_dict(self) -> dict[str, float | int | str | None]:
        """The loss parameters, for a model card."""
        config = super().get_config_dict()
        del config["weighting_scheme"]
        return config

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return RankNet.citation
