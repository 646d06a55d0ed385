"""The state of a device's own generator is part of what is saved, whichever device it is."""

from __future__ import annotations

import pytest
import torch

from rerank_fast.model.random_state import nothing_drawn, random_state, set_random_state


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_device_draws_again_what_it_drew(kind: str, monkeypatch: pytest.MonkeyPatch):
    """The device's generator is stood in for by another of the host."""
    generator, device = torch.Generator(), torch.device(kind)
    expected = () if kind == "mps" else (device,)

    def get(*which: torch.device) -> torch.Tensor:
        assert which == expected
        return generator.get_state()

    def put(state: torch.Tensor, *which: torch.device) -> None:
        assert which == expected
        generator.set_state(state)

    module = torch.get_device_module(kind)
    monkeypatch.setattr(module, "get_rng_state", get)
    monkeypatch.setattr(module, "set_rng_state", put)
    before = random_state(device)
    host, own = torch.rand(3), torch.rand(3, generator=generator)
    assert not nothing_drawn(before, random_state(device))
    set_random_state(before, device)
    assert nothing_drawn(before, random_state(device))
    assert torch.equal(torch.rand(3), host)
    assert torch.equal(torch.rand(3, generator=generator), own)


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_the_host_draws_for_a_device_without_a_generator(kind: str):
    assert len(random_state(torch.device(kind))) == 1
