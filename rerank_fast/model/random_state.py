"""The state of the generators that a forward pass may draw from."""

from __future__ import annotations

import torch
from torch import Tensor


def random_state(device: torch.device) -> list[Tensor]:
    """Of torch's generator of the host and, of a GPU, the device's."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def nothing_drawn(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether no generator has moved from one state to the other."""
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
