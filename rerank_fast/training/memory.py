"""How much memory there is, and about how much a step takes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch

# Activations that a layer keeps, in bytes per token and unit of width in 16 bits, attention's own
# matrices left out (Korthikanti et al. 2022, "Reducing activation recomputation in large
# transformer models", section 4.1).
_BYTES_PER_UNIT = 34


def activation_bytes(
    model: Any, num_tokens: int, dtype: torch.dtype, *, gradient_checkpointing: bool
) -> int:
    """About what the graphs of this many tokens take; with checkpointing only the inputs of the
    layers are kept.
    """
    config = model.config
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    per_unit = (
        (4 + dtype.itemsize) if gradient_checkpointing else _BYTES_PER_UNIT * dtype.itemsize // 2
    )
    return num_tokens * layers * width * per_unit


def available_bytes(device: torch.device) -> int:
    """Memory that is free now on the device; on a CPU also what its control group leaves."""
    if device.type in ("cuda", "xpu"):
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    left = _control_group_bytes()
    return free if left is None else min(free, left)


# Of control groups, version 2 and 1: the limit, what is used, and how memory.stat names the part of
# it that holds files which the kernel gives up when memory is asked for.
_CONTROL_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def _control_group_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the control group of a container leaves; None where there is none, or no limit."""
    for *names, inactive in _CONTROL_GROUPS:
        limit, used, stat = (root / name for name in names)
        if not (limit.is_file() and used.is_file()):
            continue
        if not (most := limit.read_text().strip()).isdigit():  # "max"
            return None
        entries = (
            dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
        )
        return int(most) - int(used.read_text()) + int(entries.get(inactive, 0))
    return None
