"""What a dtype's name means: of the weights, of the arithmetic, and whether linear layers go to int8."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from rerank_fast.model.linear import StepLinear

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """weights None keeps the checkpoint's own; compute is for packed execution; None is the weights'."""

    weights: torch.dtype | None = None
    compute: torch.dtype | None = None
    int8: bool = False


def choose_precision(dtype: str | torch.dtype | Precision | None, device: torch.device) -> Precision:
    """See CrossEncoder's dtype; a choice that was made elsewhere is taken."""
    if isinstance(dtype, Precision):
        return dtype
    if dtype == "auto":
        return Precision(weights=_fastest(device))
    if dtype in ("int8", torch.int8):
        if device.type != "cpu":
            raise ValueError(
                f"dtype int8 is for the CPU, got device {device}; expected float32, bfloat16 or float16"
            )
        return Precision(compute=_fastest(device), int8=True)
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f'dtype must be float32, bfloat16, float16, "auto", "int8" or None, got {dtype!r}')
    return Precision(weights=kind)


def _fastest(device: torch.device) -> torch.dtype:
    """The fastest dtype that keeps the accuracy of bf16."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if native else torch.float16
        why = "it multiplies that" if native else "it has no bf16 of its own"
    elif device.type == "cpu":
        # The flag of an instruction does not say how fast it is, nor whether the library uses it.
        wide, narrow = product_seconds(torch.float32), product_seconds(torch.bfloat16)
        dtype = torch.bfloat16 if narrow < 0.8 * wide else torch.float32
        why = f"a product takes {1e3 * narrow:.2f} ms in bfloat16, {1e3 * wide:.2f} ms in float32"
    else:
        dtype, why = torch.float32, "nothing else is known to be faster"
    logger.info("dtype auto: %s on %s: %s", str(dtype).removeprefix("torch."), device, why)
    return dtype


@lru_cache
def product_seconds(dtype: torch.dtype) -> float:
    """Of 128 x 384 by 384 x 384, as inference multiplies; measured once a process, in some milliseconds."""
    times = []
    with torch.inference_mode():
        product, x = StepLinear([nn.Linear(384, 384, dtype=dtype)], dtype, 0), torch.ones(128, 384, dtype=dtype)
        for _ in range(6):
            started = time.perf_counter()
            product(x)
            times.append(time.perf_counter() - started)
    return min(times[1:])
