"""CPU kernels are tested with those of every instruction set that the machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rerank_fast.ops import cpu


def each_instruction_set(backend: str = "cpu") -> Iterator[str]:
    """Chooses the CPU kernels of one set after another and names it; another backend is named once.

    For comparisons with what takes longer than the kernels: it is computed once for all sets.
    """
    if backend != "cpu":
        yield backend
        return
    assert cpu.available(), cpu.unavailable_reason()
    before = cpu.instruction_set()
    try:
        for name in cpu.instruction_sets():
            cpu.choose_instruction_set(name)
            yield name
    finally:
        cpu.choose_instruction_set(before)


@pytest.fixture(params=cpu.instruction_sets() or [None])
def instruction_set(request):
    """For @pytest.mark.usefixtures: once for each set, whose kernels run meanwhile."""
    if request.param is None:
        params = request.node.callspec.params
        if params.get("backend", "cpu") == "cpu":
            pytest.fail(cpu.unavailable_reason())
        yield None
        return
    before = cpu.instruction_set()
    cpu.choose_instruction_set(request.param)
    yield request.param
    cpu.choose_instruction_set(before)


def pytest_collection_modifyitems(config, items):
    """Other backends have no such sets: once is enough for them."""
    again = []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        other_set = params.get("instruction_set") not in (None, *cpu.instruction_sets()[:1])
        if other_set and params.get("backend", "cpu") != "cpu":
            again.append(item)
    if again:
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if item not in set(again)]
