"""Losses of scored lists: flat scores, labels and offsets in, the sum over their units out.

Adding one is a file beside this one and a line below. Looking at the names imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rerank_fast.objectives.base import Objective as Objective
    from rerank_fast.objectives.base import ObjectiveSum as ObjectiveSum

# As the settings name them, and the file and the class of each.
NAMES = {
    "lambda_loss": "lambda_loss.LambdaLoss",
    "ranknet": "ranknet.RankNet",
    "listnet": "listnet.ListNet",
    "listmle": "listmle.ListMLE",
    "plistmle": "plistmle.PListMLE",
    "infonce": "infonce.InfoNCE",
    "binary_cross_entropy": "binary_cross_entropy.BinaryCrossEntropy",
    "mse": "mse.MSE",
    "margin_mse": "margin_mse.MarginMSE",
    "adr_mse": "adr_mse.ADRMSE",
    "approx_ndcg": "approx_ndcg.ApproxNDCG",
}

__all__ = ["NAMES", "Objective", "ObjectiveSum"]


def check_name(name: object) -> None:
    """Raises ValueError, which lists those that there are, unless there is an objective of that
    name.
    """
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"unknown objective {name!r}; there are {', '.join(NAMES)}")


def objective_class(name: str) -> type[Objective]:
    """The class of an objective.

    Raises:
        ValueError: no such objective; lists those that there are.
    """
    check_name(name)
    file, _, kind = NAMES[name].partition(".")
    return getattr(import_module(f"{__name__}.{file}"), kind)


def __getattr__(name: str) -> Any:
    if name not in ("Objective", "ObjectiveSum"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.base"), name)
