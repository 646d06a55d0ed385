"""The listwise training loop. Names load on first use, so that reading a config does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rerank_fast.training.config import TrainingConfig

if TYPE_CHECKING:
    from rerank_fast.training.trainer import Trainer as Trainer
    from rerank_fast.training.trainer import TrainingResult as TrainingResult

__all__ = ["Trainer", "TrainingConfig", "TrainingResult"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("rerank_fast.training.trainer"), name)
