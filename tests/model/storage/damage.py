"""Ways to change a model directory, and how the result is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rerank_fast import CrossEncoder

PAIRS = [("what is a panda", "a panda is a kind of bear"), ("rain", "the sea")]


def edit(directory: Path, name: str, **changes: Any) -> None:
    file = directory / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        CrossEncoder(directory, device="cpu")
    assert "\n" not in str(error.value)
    assert directory.name in str(error.value)


def shard(directory: Path, names: dict[str, str], **index: Any) -> None:
    """Two shards of the weights, and an index that gives a shard's tensors another file's name
    where asked.
    """
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        name = f"model-{number}-of-2.safetensors"
        save_file({key: tensors[key] for key in part}, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, names.get(name, name))
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map, **index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
