"""What `rerank-fast --version` prints: what a report of a fault needs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from rerank_fast import __version__
from rerank_fast.ops import cpu


def version_text() -> str:
    """Versions, then the kernels that are here and those of them that run."""
    there = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers"))
    return "\n".join(
        (
            f"rerank-fast {__version__} (Python {platform.python_version()}, {there})",
            f"CPU kernels: {_cpu_kernels()}",
            f"GPU kernels: Triton {_version('triton')}, {_gpu()}",
        )
    )


def _cpu_kernels() -> str:
    if not cpu.available():
        return f"none, {cpu.unavailable_reason()}"
    return f"{cpu.instruction_set()}, of {', '.join(cpu.instruction_sets())} on this processor"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "no GPU here"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
