"""Which backend serves an op here."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch

from rerank_fast.ops import cpu
from rerank_fast.ops.triton import guard

Backend = Literal["reference", "cpu", "triton"]
_BACKENDS = get_args(Backend)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # found, not loaded
# By device, the best first. On the CPU Triton would be its interpreter: only on request.
_BEST = {"cpu": ("cpu",), "cuda": ("flash", "triton")}
_warned: list[str] = []


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def unavailable(backend: str, device: torch.device) -> str:
    """Why a backend can't run here on tensors of a device, to follow its name; empty where it can."""
    if backend == "cpu":
        if device.type != "cpu":
            return f"takes CPU tensors, got tensors on {device}"
        return "" if cpu.available() else f"can't run: {cpu.unavailable_reason()}"
    if backend == "triton":
        return guard.refusal(device) if HAS_TRITON else "can't run: triton is not installed (pip install triton)"
    return ""


def resolve(
    op: str,
    backend: str | None,
    device: torch.device,
    choices: tuple[str, ...] = _BACKENDS,
    unserved: Callable[[str], str] | None = None,
) -> str:
    """The name of the backend that runs an op.

    Args:
        op: its name, for the warning that the compiled module is missing; a process gets it once, for all ops.
        backend: the one asked for; None takes the best of the device, and "reference" where none can run.
        device: of the tensors.
        choices: the op's backends.
        unserved: why a backend doesn't take these tensors, to follow its name ("takes fp32, got ..."); empty where
            it does. Not asked about the reference, which takes all.

    Raises:
        ValueError: not one of choices, or one that can't run.
    """
    if backend is None:
        for name in _BEST.get(device.type, ()):
            if name not in choices or (unserved is not None and unserved(name)):
                continue
            if not unavailable(name, device):
                return name
            if name == "cpu" and not _warned and not torch.compiler.is_compiling():
                _warned.append(op)
                warnings.warn(
                    f"rerank_fast runs {op} and its other ops through slower eager PyTorch: "
                    f"{cpu.unavailable_reason()}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return "reference"
    if backend not in choices:
        raise ValueError(f"backend must be one of {choices} or None, got {backend!r}")
    if backend != "reference":
        reason = ("" if unserved is None else unserved(backend)) or unavailable(backend, device)
        if reason:
            raise ValueError(f"backend {backend!r} {reason}")
    return backend
