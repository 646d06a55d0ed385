"""Which dtypes this machine multiplies fast. Training, evaluation and inference all ask here."""

from __future__ import annotations

import functools
import logging
import time

import torch
from torch import nn

from rerank_fast.model.packed.linear import StepLinear

logger = logging.getLogger(__name__)

_HALVES = (torch.bfloat16, torch.float16)


def fastest(device: torch.device) -> torch.dtype:
    """The fastest dtype that keeps the accuracy of bf16; one line in the log says which and why."""
    if device.type == "cuda":
        native = is_fast(torch.bfloat16, device)
        dtype = torch.bfloat16 if native else torch.float16
        why = "it multiplies that" if native else "it has no bf16 of its own"
    elif device.type == "cpu":
        dtype = torch.bfloat16 if is_fast(torch.bfloat16, device) else torch.float32
        why = timings(torch.bfloat16)
    else:
        dtype, why = torch.float32, "nothing else is known to be faster"
    logger.info("dtype auto: %s on %s: %s", name_of(dtype), device, why)
    return dtype


def arithmetic(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What weights of a dtype are computed in: that, or fp32 on a CPU or an NVIDIA GPU that only
    emulates it.

    fp32 keeps all that they say, and an emulation takes up to ten times as long.
    """
    if device.type not in ("cpu", "cuda") or dtype not in _HALVES or is_fast(dtype, device):
        return dtype
    return torch.float32


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a CUDA device or the CPU multiplies a 16-bit dtype faster than fp32."""
    if device.type == "cuda":
        return dtype == torch.float16 or _has_bf16(device)
    # An instruction's flag does not say how fast it is, nor whether the library uses it.
    return product_seconds(dtype) < 0.8 * product_seconds(torch.float32)


def why_slow(dtype: torch.dtype, device: torch.device) -> str:
    """What is_fast goes by where it says no, in words."""
    return "this GPU has no bf16 of its own" if device.type == "cuda" else timings(dtype)


def _has_bf16(device: torch.device) -> bool:
    """Whether a GPU multiplies it, whichever of the GPUs is the current one."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def timings(dtype: torch.dtype) -> str:
    """What was measured of a dtype beside fp32 on the CPU, in words."""
    narrow, wide = (1e3 * product_seconds(one) for one in (dtype, torch.float32))
    return f"a product takes {narrow:.2f} ms in {name_of(dtype)}, {wide:.2f} ms in float32"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def product_seconds(dtype: torch.dtype) -> float:
    """Of 128 x 384 by 384 x 384 as inference multiplies on one thread of the CPU.

    Measured once a process, in some milliseconds. Several threads would wait for each other where
    other work runs beside them, and the answer be that work's.
    """
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            product = StepLinear([nn.Linear(384, 384, dtype=dtype)], dtype, 0)
            x = torch.ones(128, 384, dtype=dtype)
            for _ in range(6):
                started = time.perf_counter()
                product(x)
                times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return min(times[1:])
