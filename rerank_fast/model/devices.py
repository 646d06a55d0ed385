"""Which device a model goes to, and what is said where one is missing, too old or lost."""

from __future__ import annotations

import logging
import os
import re
import warnings
from typing import Any

import torch

logger = logging.getLogger(__name__)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None takes the first GPU that torch can use, else the CPU.

    Raises:
        ValueError: no such device here, with what hides it.
    """
    if device is None:
        return torch.device("cuda") if _sees_gpu() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be cpu, cuda, cuda:1, mps, xpu or the like, got {device!r}"
        ) from error
    if chosen.type in ("cpu", "meta"):
        return chosen
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!s} can't be used: {_why_no_gpu()}")
    module: Any = torch.get_device_module(chosen.type)
    if not module.is_available():
        raise ValueError(
            f"device {device!s} can't be used: this torch or this machine has no {chosen.type}"
        )
    count = module.device_count()
    if chosen.index is not None and chosen.index >= count:
        raise ValueError(
            f"device {device!s} is not there: {chosen.type} has {count}, counted from 0"
        )
    return chosen


def _sees_gpu() -> bool:
    """Whether torch can use one; a driver that is too old for it is said in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    for one in caught:
        if "CUDA initialization" in str(one.message):
            logger.warning("The CPU is used: %s", _first_sentences(str(one.message)))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return available


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs alone"
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        hidden = os.environ.get(name)
        if hidden is not None and hidden.strip() in ("", "-1"):
            return f"{name} is {hidden!r}, which hides every GPU"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_sentences(str(error))
    return "torch finds none"


def _first_sentences(message: str) -> str:
    """Of one of torch's own messages, without where to download drivers and where it was raised."""
    message = re.sub(r"^.*CUDA initialization: ", "", message.strip().splitlines()[0])
    return re.split(r" Please update | \(Triggered internally", message)[0].rstrip(". ")


def empty_cache(device: torch.device) -> None:
    """Give back what torch keeps of a device's memory, for a smaller attempt to be cut anew."""
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).empty_cache()


# What the machine lacks or has lost, in the words of drivers, runtimes and their libraries. An
# illegal access or a device-side assertion is a bug and keeps its trace.
_FAULTS = (
    (
        r"driver on your system is too old|driver version is insufficient",
        "the GPU's driver is older than this torch needs: expected a newer driver, or a torch "
        "that is built for this one",
    ),
    (
        r"no kernel image is available|not compatible with the current PyTorch installation",
        "this torch has no kernels for this GPU: expected a torch that is built for it",
    ),
    (
        r"No CUDA GPUs are available|no CUDA-capable device|No HIP GPUs|invalid device ordinal",
        "there is no such GPU: expected one that CUDA_VISIBLE_DEVICES shows",
    ),
    (
        r"busy or unavailable|exclusive compute mode",
        "the GPU is taken by another process",
    ),
    (
        r"unspecified launch failure|uncorrectable ECC|fallen off the bus|GPU is lost"
        r"|[Dd]evice lost|hardware stack error|the launch timed out|DEVICE_LOST"
        r"|CUDA error: unknown error|HIP error: unknown error|system not yet initialized",
        "the GPU was lost: a run of this package goes on from its last checkpoint with --resume "
        "auto",
    ),
)


def fault(error: BaseException) -> str:
    """What a GPU or its driver lacks, in one line, with the first line of the error; empty for
    others.
    """
    message = str(error).strip()
    for pattern, meaning in _FAULTS:
        if re.search(pattern, message):
            return f"{meaning} ({_first_sentences(message)})"
    return ""
