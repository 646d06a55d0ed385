"""Versions, and what this GPU reaches at its best: a copy, and bf16 products, large and of the
models' shapes."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from benchmarks.tools.gpu_parts.results import MEASURED, Results, rate
from benchmarks.tools.gpu_parts.timing import kernel_seconds

_PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "flash-attn", "numpy")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def run(results: Results) -> None:
    device = results.device
    results.add("versions", **versions(), card={} if results.dry else _card())
    for name, elements, dtype in (
        ("copy", 2**30, torch.int8),
        ("copy, fp32", 2**26, torch.float32),
    ):
        source = torch.ones(2**10 if results.dry else elements, dtype=dtype, device=device)
        target = torch.empty_like(source)
        moved = 2 * source.numel() * source.element_size()
        seconds = kernel_seconds(lambda to=target, of=source: to.copy_(of), device)
        results.add(name, measured_seconds=seconds, measured_bytes_per_second=rate(moved, seconds))
    # Rows, inputs and outputs: the best there is, then MiniLM-L12's widest product, and its
    # weight's gradient.
    for rows, width, columns in ((8192, 8192, 8192), (10400, 384, 1536), (1536, 10400, 384)):
        if results.dry:
            rows, width, columns = 16, 16, 16
        left = torch.randn(rows, width, device=device).bfloat16()
        right = torch.randn(columns, width, device=device).bfloat16()
        seconds = kernel_seconds(lambda a=left, b=right: a @ b.t(), device)
        flops = 2 * rows * width * columns
        results.add(
            f"bf16 product {rows} x {width} x {columns}",
            measured_seconds=seconds,
            measured_flops_per_second=rate(flops, seconds),
        )


def measured(results: Results) -> tuple[float | None, float | None]:
    """Bytes and operations a second, the best of what this part found in this run."""
    best: dict[str, float] = {}
    for row in results.other("ceilings"):
        for key, value in row.items():
            if key.startswith(MEASURED) and key.endswith("per_second") and value is not None:
                best[key] = max(best.get(key, 0.0), value)
    return best.get("measured_bytes_per_second"), best.get("measured_flops_per_second")
