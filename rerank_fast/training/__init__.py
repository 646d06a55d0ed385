"""The listwise training loop. Names load on first use, so that reading a config does not import
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rerank_fast.training.config import TrainingConfig

if TYPE_CHECKING:
    from rerank_fast.training.events import Event as Event
    from rerank_fast.training.events import TrainingInterrupted as TrainingInterrupted
    from rerank_fast.training.run import TrainingResult as TrainingResult
    from rerank_fast.training.trainer import Trainer as Trainer

__all__ = ["Event", "Trainer", "TrainingConfig", "TrainingInterrupted", "TrainingResult"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    rooms = {"Event": "events", "TrainingInterrupted": "events", "TrainingResult": "run"}
    room = rooms.get(name, "trainer")
    return getattr(import_module(f"rerank_fast.training.{room}"), name)
