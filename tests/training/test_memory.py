"""Free memory, and what a graph takes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rerank_fast.training import memory
from rerank_fast.training.memory import activation_bytes, available_bytes
from tests.model.test_gradient_cache import opened

GIB = 2**30
V1 = {
    "limit": "memory/memory.limit_in_bytes",
    "used": "memory/memory.usage_in_bytes",
    "stat": "memory/memory.stat",
}
V2 = {"limit": "memory.max", "used": "memory.current", "stat": "memory.stat"}


def test_the_estimate_of_activations_is_near_what_a_graph_keeps(tiny_bert: Path):
    """What autograd saves for backward, each storage once, beside the estimate: within a factor of
    two.
    """
    model, lists = opened(tiny_bert)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    step = model.prepare(lists.pairs)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores = step(np.arange(len(lists.pairs)))
    assert scores.requires_grad
    found = sum(size for pointer, size in kept.items() if pointer not in weights)
    tokens = len(lists.pairs.input_ids)
    estimate = activation_bytes(model.model, tokens, torch.float32, gradient_checkpointing=False)
    assert 0.5 < found / estimate < 2
    assert (
        activation_bytes(model.model, tokens, torch.float32, gradient_checkpointing=True)
        < estimate / 8
    )


@pytest.mark.parametrize(("names", "key"), [(V1, "total_inactive_file"), (V2, "inactive_file")])
def test_files_that_the_kernel_keeps_in_memory_count_as_free(names: dict, key: str, tmp_path: Path):
    """As after a container has read 11 GiB of data: they are used, and given up when asked for."""
    for name, value in (
        (names["limit"], str(16 * GIB)),
        (names["used"], str(15 * GIB)),
        (names["stat"], f"anon {4 * GIB}\nactive_file 7\n{key} {11 * GIB}"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    assert memory._control_group_bytes(tmp_path) == 12 * GIB
    (tmp_path / names["stat"]).unlink()
    assert memory._control_group_bytes(tmp_path) == GIB


def test_a_control_group_without_a_limit_sets_none(tmp_path: Path):
    assert memory._control_group_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert memory._control_group_bytes(tmp_path) is None


def test_the_least_of_machine_and_control_group_counts(monkeypatch: pytest.MonkeyPatch):
    machine = available_bytes(torch.device("cpu"))
    assert machine > 0
    monkeypatch.setattr(memory, "_control_group_bytes", lambda: 1000)
    assert available_bytes(torch.device("cpu")) == 1000
