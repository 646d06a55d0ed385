"""Arguments of sentence-transformers' CrossEncoder under older names, and those that decide nothing
here.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

_OLDER = {"sentences": "inputs", "activation_fct": "activation_fn"}
# What a tokenizer's own threads do; a softmax over one label; what rank() always returns.
_WITHOUT_EFFECT = ("num_workers", "apply_softmax", "convert_to_numpy", "convert_to_tensor")
# Their processes, one a device; score_file and the Trainer score in several of their own.
_UNSERVED = ("device", "pool", "chunk_size")


def with_older_names(method: F) -> F:
    """The method, called by the arguments of today's or of older releases of
    sentence-transformers.
    """
    names = inspect.signature(method).parameters

    @functools.wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        for older, name in _OLDER.items():
            if older in options and name in names:
                if name in options:
                    raise TypeError(
                        f"{method.__name__}() got both {name} and its older name {older}"
                    )
                _say_older(method.__name__, older, name)
                options[name] = options.pop(older)
        for name in _WITHOUT_EFFECT:
            if name not in names:
                options.pop(name, None)
        for name in _UNSERVED:
            if options.pop(name, None) is not None:
                raise ValueError(
                    f"{method.__name__}() scores in one process on {self.device}, the model's "
                    f"device: expected no {name}; model.to() moves it"
                )
        return method(self, *args, **options)

    return call  # type: ignore[return-value]


class NoCardData:
    """Where sentence-transformers' evaluators put what they measured; this package's cards are the
    Trainer's.
    """

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: Any, epoch: int = 0, step: int = 0
    ) -> None:
        """Nothing: they return it too."""


@functools.cache
def _say_older(method: str, older: str, name: str) -> None:
    logger.warning("CrossEncoder.%s: %s is called %s now.", method, older, name)
