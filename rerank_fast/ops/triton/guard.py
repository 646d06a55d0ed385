"""Where the kernels run. Imports no triton: whoever chooses a backend asks here first."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

HIP = torch.version.hip is not None


def for_vendor(config: dict[str, Any], hip: bool = HIP) -> dict[str, Any]:
    """A launch config without what AMD's compiler does not know."""
    return {name: value for name, value in config.items() if not (hip and name == "maxnreg")}


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(device: torch.device) -> str:
    """Why kernels don't take tensors of a device, to follow the backend's name; empty where they
    do.
    """
    if device.type == "cuda" or interpreted():
        return ""
    return (
        f"takes CUDA or ROCm tensors, got tensors on {device}; "
        "set TRITON_INTERPRET=1 before the first use to run its interpreter on the CPU"
    )


def require_gpu(tensor: Tensor) -> None:
    """Raises ValueError for a tensor that is not on a GPU, outside the interpreter; one on meta
    stands for a GPU's.
    """
    if not (tensor.is_cuda or tensor.is_meta) and (reason := refusal(tensor.device)):
        raise ValueError(f"backend 'triton' {reason}")
