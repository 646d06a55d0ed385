"""Which backends an op has, which one serves here, and how an op is declared to PyTorch.

An op is a file. Its `Backends` name what runs it, each with a loader and with what it takes; its
`declare`d functions hand checked tensors to the one that was chosen.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rerank_fast.ops import cpu
from rerank_fast.ops.triton import guard

Backend = Literal["reference", "cpu", "triton"]  # of most ops
HAS_TRITON = importlib.util.find_spec("triton") is not None  # found, not loaded
_LIBRARY = torch.library.Library("rerank_fast", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)
_warned: list[str] = []


def declare(
    name: str, *, fake: Callable[..., Any] | None = None, mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function of tensors and options, which becomes an op of PyTorch's.

    Whatever traces or wraps tensors sees the op, and so do meta tensors; plain ones go without the
    dispatcher, which costs more than the kernel of a short batch. The first argument decides, and
    is a tensor. The function's annotations are the op's schema.

    Args:
        name: of torch.ops.rerank_fast.
        fake: gives results of the right shapes, strides and dtypes, and computes nothing; None
            where the function itself does so for meta tensors.
        mutates: names of arguments that are written.
    """

    def as_op(run: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(run, mutates_args=mutates)
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        if fake is not None:
            torch.library.register_fake(f"rerank_fast::{name}", fake, lib=_LIBRARY)
        op = getattr(torch.ops.rerank_fast, name).default

        @functools.wraps(run)
        def call(first: Tensor, *rest: Any) -> Any:
            plain = (
                type(first) in _PLAIN
                and not first.is_meta
                and not torch.compiler.is_compiling()
                and not is_in_torch_dispatch_mode()
            )
            return (run if plain else op)(first, *rest)

        return call

    return as_op


def takes_all(*facts: Any) -> str:
    """Refuses nothing."""
    return ""


@dataclass(frozen=True)
class Served:
    """One backend of an op.

    Args:
        load: gives the functions that run it, in the order of the op's other backends; called when
            the first of them is needed, so that what it imports is not imported before.
        refusal: of what the op's `Backends.resolve` is asked about, why the backend doesn't take
            it, to follow its name ("takes fp32, got ..."); empty where it does.
    """

    load: Callable[[], tuple[Callable[..., Any], ...]]
    refusal: Callable[..., str] = takes_all


class Backends:
    """The backends of one op, by name.

    Args:
        op: its name, for messages.
        served: "reference", which takes everything, and others.
    """

    def __init__(self, op: str, **served: Served) -> None:
        self._op, self._served = op, served
        self._loaded: dict[str, tuple[Callable[..., Any], ...]] = {}

    def __getitem__(self, name: str) -> tuple[Callable[..., Any], ...]:
        """The functions of a backend that resolve() gave."""
        if name not in self._loaded:
            self._loaded[name] = self._served[name].load()
        return self._loaded[name]

    def resolve(self, backend: str | None, tensor: Tensor, *facts: Any) -> str:
        """The name of the backend that runs a call.

        Args:
            backend: the one asked for; None takes the best of their device, and "reference" where
                none can run.
            tensor: one of those the op takes; all are on one device.
            facts: what the op's refusals ask about beside it.

        Raises:
            ValueError: not one of the op's, or one that can't run.
        """
        if backend is None:
            return self._best(tensor, facts)
        if not isinstance(backend, str) or backend not in self._served:
            names = tuple(self._served)
            raise ValueError(f"backend must be one of {names} or None, got {backend!r}")
        if backend != "reference":
            refusal = self._served[backend].refusal(tensor, *facts)
            if refusal := refusal or _refusal(backend, tensor.device):
                raise ValueError(f"backend {backend!r} {refusal}")
            if reason := missing(backend):
                raise ValueError(f"backend {backend!r} can't run: {reason}")
        return backend

    def _best(self, tensor: Tensor, facts: tuple[Any, ...]) -> str:
        # Not device.type: to make that string takes as long as the kernel of a short batch. On the
        # CPU Triton would be its interpreter: only on request.
        # A meta tensor stands for a GPU's: the ops' fakes then show what a step would launch.
        gpu = ("flash", "triton") if tensor.is_cuda else ("triton",) if tensor.is_meta else ()
        for name in ("cpu",) if tensor.is_cpu else gpu:
            served = self._served.get(name)
            if served is None or served.refusal(tensor, *facts):
                continue
            if not (reason := missing(name)):
                return name
            if name == "cpu" and not _warned and not torch.compiler.is_compiling():
                _warned.append(self._op)  # once a process, for all ops
                warnings.warn(
                    f"rerank_fast runs {self._op} and its other ops through slower eager PyTorch: "
                    f"{reason}",
                    RuntimeWarning,
                    stacklevel=4,
                )
        return "reference"


def missing(backend: str) -> str:
    """What a backend lacks here, and how to get it; empty where it is there."""
    if backend == "cpu" and not cpu.available():
        return cpu.unavailable_reason()
    if backend == "triton" and not HAS_TRITON:
        return "triton is not installed (pip install triton)"
    return ""


def _refusal(backend: str, device: torch.device) -> str:
    """Why a backend doesn't take tensors of a device, to follow its name; empty where it does."""
    if backend == "cpu" and device.type != "cpu":
        return f"takes CPU tensors, got tensors on {device}"
    return guard.refusal(device) if backend == "triton" else ""
