"""What the name of a dtype asks for: of the weights, and whether linear layers go to int8."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rerank_fast.model.precision.hardware import fastest

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Precision:
    """What a model is opened with.

    Attributes:
        weights: None keeps the checkpoint's own.
        compute: of products in packed execution; None is what the weights are computed in here.
        int8: whether linear layers are quantised.
    """

    weights: torch.dtype | None = None
    compute: torch.dtype | None = None
    int8: bool = False


def choose_precision(
    dtype: str | torch.dtype | Precision | None, device: torch.device
) -> Precision:
    """See CrossEncoder's dtype; a choice that was made elsewhere is taken.

    Raises:
        ValueError: no such dtype, or int8 on another device than the CPU.
    """
    if isinstance(dtype, Precision):
        return dtype
    if dtype == "auto":
        return Precision(weights=fastest(device))
    if dtype in ("int8", torch.int8):
        if device.type != "cpu":
            raise ValueError(
                f"dtype int8 is for the CPU, got device {device}; expected float32, bfloat16 or "
                "float16"
            )
        return Precision(compute=fastest(device), int8=True)
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and kind not in _WEIGHTS:
        raise ValueError(
            f'dtype must be float32, bfloat16, float16, "auto", "int8" or None, got {dtype!r}'
        )
    return Precision(weights=kind)
