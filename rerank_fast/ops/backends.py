"""Which backend serves an op here."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from rerank_fast.ops import cpu
from rerank_fast.ops.triton import guard

Backend = Literal["reference", "cpu", "triton"]
CHOICES = get_args(Backend)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # found, not loaded
_warned: list[str] = []


def missing(backend: str) -> str:
    """What a backend lacks here, and how to get it; empty where it is there."""
    if backend == "cpu" and not cpu.available():
        return cpu.unavailable_reason()
    return (
        "triton is not installed (pip install triton)"
        if backend == "triton" and not HAS_TRITON
        else ""
    )


def _refusal(backend: str, device: torch.device) -> str:
    """Why a backend doesn't take tensors of a device, to follow its name; empty where it does."""
    if backend == "cpu" and device.type != "cpu":
        return f"takes CPU tensors, got tensors on {device}"
    return guard.refusal(device) if backend == "triton" else ""


def resolve(
    op: str,
    backend: str | None,
    tensor: Tensor,
    choices: tuple[str, ...] = CHOICES,
    unserved: Callable[[str], str] | None = None,
) -> str:
    """The name of the backend that runs an op.

    Args:
        op: its name, for the warning that the compiled module is missing; a process gets it once,
            for all ops.
        backend: the one asked for; None takes the best of their device, and "reference" where none
            can run.
        tensor: one of those it takes; all are on one device.
        choices: the op's backends.
        unserved: why a backend doesn't take these tensors, to follow its name ("takes fp32, got
            ..."); empty where it does. Not asked about the reference, which takes all.

    Raises:
        ValueError: not one of choices, or one that can't run.
    """
    if backend is None:
        # Not device.type: to make that string takes as long as the kernel of a short batch. On the
        # CPU Triton would be its interpreter: only on request.
        # A meta tensor stands for a GPU's: the ops' fakes then show what a step would launch.
        gpu = ("flash", "triton") if tensor.is_cuda else ("triton",) if tensor.is_meta else ()
        best = ("cpu",) if tensor.is_cpu else gpu
        for name in best:
            if name not in choices or (unserved is not None and unserved(name)):
                continue
            if not (reason := missing(name)):
                return name
            if name == "cpu" and not _warned and not torch.compiler.is_compiling():
                _warned.append(op)
                warnings.warn(
                    f"rerank_fast runs {op} and its other ops through slower eager PyTorch: "
                    f"{reason}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return "reference"
    if not isinstance(backend, str) or backend not in choices:
        raise ValueError(f"backend must be one of {choices} or None, got {backend!r}")
    if backend != "reference":
        if reason := (unserved is not None and unserved(backend)) or _refusal(
            backend, tensor.device
        ):
            raise ValueError(f"backend {backend!r} {reason}")
        if reason := missing(backend):
            raise ValueError(f"backend {backend!r} can't run: {reason}")
    return backend
