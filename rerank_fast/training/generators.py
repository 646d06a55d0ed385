"""Every generator of random numbers that a run may draw from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rerank_fast.model.random_state import device_state, set_device_state


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a run may draw from, as plain numbers."""
    legacy: Any = np.random.get_state()
    name, keys, place, has_gauss, gauss = legacy
    version, internal, next_gauss = random.getstate()
    own = device_state(device)
    return {
        "python": [version, list(internal), next_gauss],
        "numpy": [name, keys.tolist(), place, has_gauss, gauss],
        "torch": torch.get_rng_state().tolist(),
        "cuda": None if own is None else own.tolist(),  # or another device's
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    python, numpy, cpu = generators_in(state)
    random.setstate(python.getstate())
    np.random.set_state(numpy.get_state())
    torch.set_rng_state(cpu.get_state())
    if device_state(device) is not None and state["cuda"] is not None:
        set_device_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)


def generators_in(
    state: Mapping[str, Any],
) -> tuple[random.Random, np.random.RandomState, torch.Generator]:
    """Generators in that state, which nobody draws from: an error shows before anything is set."""
    python, numpy, cpu = random.Random(), np.random.RandomState(), torch.Generator()
    version, internal, next_gauss = state["python"]
    python.setstate((version, tuple(internal), next_gauss))
    name, keys, *rest = state["numpy"]
    numpy.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    cpu.set_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None:
        torch.tensor(state["cuda"], dtype=torch.uint8)
    return python, numpy, cpu
