"""The state of the generators that a forward pass may draw from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def random_state(device: torch.device) -> list[Tensor]:
    """Of torch's generator of the host and, where the device has one of its own, the device's."""
    own = device_state(device)
    return [torch.get_rng_state()] if own is None else [torch.get_rng_state(), own]


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for own in states[1:]:
        set_device_state(own, device)


def device_state(device: torch.device) -> Tensor | None:
    """Of the device's own generator; None where it has none."""
    if device.type in ("cpu", "meta"):
        return None
    module: Any = torch.get_device_module(device)  # torch.cuda, torch.xpu, torch.mps, ...
    return module.get_rng_state(*_which(device))


def set_device_state(state: Tensor, device: torch.device) -> None:
    module: Any = torch.get_device_module(device)
    module.set_rng_state(state, *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """What a device's module is told; of Apple's devices there is one."""
    return () if device.type == "mps" else (device,)


def nothing_drawn(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether no generator has moved from one state to the other."""
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
