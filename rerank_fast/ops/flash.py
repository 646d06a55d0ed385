"""FlashAttention as a library brings it: which function there is, and which calls its signature
takes.

None of these functions is ours, and their signatures change from release to release. Each is looked
at once; what it can't take is refused with a reason, and another backend runs.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Keys left and right of a query's own place, which is counted from the sequences' ends.
Window = tuple[int, int]
_UNLIMITED, _CAUSAL = (-1, -1), (-1, 0)


class TorchFlash:
    """torch.nn.attention.varlen.varlen_attn.

    torch 2.10 has is_causal, neither windows nor a scale; 2.11 has these in its place; 2.12 adds
    enable_gqa. Its backward adds with atomics: gradients differ in their last bits from run to run,
    unless torch.use_deterministic_algorithms(True) was called.
    """

    name = "torch.nn.attention.varlen"

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.known = frozenset(inspect.signature(function).parameters)

    def lacks(
        self, q: Tensor, k: Tensor, scale: float, window: Window, softcap: float | None = None
    ) -> str:
        """What the function has no parameter for; empty where it takes the call."""
        if softcap is not None:
            return "a softcap"
        if "scale" not in self.known and scale != q.shape[2] ** -0.5:
            return "a scale"
        causal = window == _CAUSAL and "is_causal" in self.known
        if window != _UNLIMITED and not causal and "window_size" not in self.known:
            return "a window"
        return (
            "grouped heads" if q.shape[1] != k.shape[1] and "enable_gqa" not in self.known else ""
        )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *places: Any,
        scale: float,
        window: Window,
        softcap: float | None = None,
    ) -> Tensor:
        """places: cu_seqlens_q, cu_seqlens_k, and the most queries and keys of a sequence."""
        options: dict[str, Any] = {}
        if "scale" in self.known:
            options["scale"] = scale
        if "window_size" in self.known:
            options["window_size"] = window
        elif window == _CAUSAL:
            options["is_causal"] = True
        if "enable_gqa" in self.known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        return self.function(q, k, v, *places, **options)


class PackageFlash:
    """flash_attn.flash_attn_varlen_func, of the package's version 2, which takes grouped heads as
    they come.

    From 2.4 on it has a flag for gradients of the same bits every time, from 2.6 on a softcap.
    """

    name = "flash_attn"

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.known = frozenset(inspect.signature(function).parameters)

    def lacks(
        self, q: Tensor, k: Tensor, scale: float, window: Window, softcap: float | None = None
    ) -> str:
        """What the function has no parameter for; empty where it takes the call."""
        if not {"softmax_scale", "causal"} <= self.known:
            return "a scale and a causal mask"
        if softcap is not None and "softcap" not in self.known:
            return "a softcap"
        limited = window not in (_UNLIMITED, _CAUSAL)
        return "a window" if limited and "window_size" not in self.known else ""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *places: Any,
        scale: float,
        window: Window,
        softcap: float | None = None,
    ) -> Tensor:
        """places: cu_seqlens_q, cu_seqlens_k, and the most queries and keys of a sequence."""
        options: dict[str, Any] = {"softmax_scale": scale, "causal": window == _CAUSAL}
        if "window_size" in self.known:
            options["window_size"] = window
        if softcap is not None:
            options["softcap"] = softcap
        if "deterministic" in self.known:
            options["deterministic"] = True
        return self.function(q, k, v, *places, **options)


Flash = TorchFlash | PackageFlash


@cache
def _installed() -> tuple[Flash, ...]:
    found: list[Flash] = []
    try:
        from flash_attn import flash_attn_varlen_func

        found.append(PackageFlash(flash_attn_varlen_func))
    except ModuleNotFoundError:
        pass
    except (ImportError, OSError) as error:  # built for another torch
        logger.warning("flash_attn is installed, but can't be loaded: %s", error)
    try:
        from torch.nn.attention.varlen import varlen_attn

        found.append(TorchFlash(varlen_attn))
    except ImportError:
        pass
    return tuple(found)


_FOUND: list[Flash] = []


@torch.compiler.assume_constant_result
def _look() -> int:
    """Fills the list, once; torch.compile must not trace imports and signatures."""
    if not _FOUND:
        _FOUND.extend(_installed())
    return len(_FOUND)


def libraries() -> list[Flash]:
    """What is installed, best first: the package, which somebody has built for this machine."""
    _look()
    return _FOUND


def serving(
    q: Tensor, k: Tensor, scale: float, window: Window, softcap: float | None = None
) -> Flash | None:
    """The first of the libraries that takes a call."""
    for library in libraries():
        if not library.lacks(q, k, scale, window, softcap):
            return library
    return None


def refusal(
    q: Tensor, k: Tensor, scale: float, window: Window, softcap: float | None = None
) -> str:
    """Why no library takes a call, to follow the backend's name; empty where one does."""
    if serving(q, k, scale, window, softcap) is not None:
        return ""
    call = (q, k, scale, window, softcap)
    lacks = [f"{one.name} has no parameter for {one.lacks(*call)}" for one in libraries()]
    if not lacks:
        lacks = [
            f"torch {torch.__version__} has no {TorchFlash.name}, and flash_attn is not installed"
        ]
    return f"can't run: {'; '.join(lacks)}"
