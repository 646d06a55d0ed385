"""Pickled weights to safetensors: read as tensors and nothing else, because the user asked for
it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rerank_fast.model.texts import one_line, shown

_WEIGHTS = ("pytorch_model", "adapter_model")
_INDEX = "pytorch_model.bin.index.json"
# Of a model and its tokenizer; what else lies beside them is left out, optimizers' states above
# all.
_KEPT = (".json", ".txt", ".model", ".md", ".jinja", ".safetensors", ".png")


def pickled_weights(directory: Path) -> list[Path]:
    """Weights of a model directory that are pickled, its modules' too."""
    return sorted(
        path
        for path in directory.rglob("*.bin")
        if path.name.startswith(_WEIGHTS) and path.name != _INDEX
    )


def convert_pickles(source: Path, target: Path, check: Callable[[Path], object]) -> list[Path]:
    """Write a model directory whose pickled weights are safetensors; what else it holds is copied.

    torch.load reads them with weights_only: tensors, and no code is run.

    Args:
        source: the directory.
        target: another one, which is made.
        check: opens the result before it is put in place.

    Returns:
        The files that were converted.

    Raises:
        ValueError: source is no directory, has no pickled weights, or one of them holds more than
            tensors.
    """
    if not source.is_dir():
        raise ValueError(
            f"expected a local model directory, got {source}; hf download brings one of the hub"
        )
    found = pickled_weights(source)
    if not found:
        raise ValueError(f"{source} has no pickled weights (pytorch_model.bin) to convert")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.parent) as directory:
        staging = Path(directory, "model")
        for path in sorted(source.rglob("*")):
            if path.is_file() and path.suffix in _KEPT and not path.name.endswith(_INDEX):
                place = staging / path.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
        for path in found:
            place = staging / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                read_pickle(path), place.with_name(_renamed(path.name)), metadata={"format": "pt"}
            )
        for index in source.rglob(_INDEX):
            place = staging / index.relative_to(source).with_name("model.safetensors.index.json")
            place.write_text(json.dumps(_renamed_index(index), indent=2) + "\n", encoding="utf-8")
        check(staging)
        for path in sorted(path for path in staging.rglob("*") if path.is_file()):
            place = target / path.relative_to(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    return found


def _renamed(name: str) -> str:
    return name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def _renamed_index(index: Path) -> dict[str, Any]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        return {
            **content,
            "weight_map": {key: _renamed(name) for key, name in content["weight_map"].items()},
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights: {one_line(error)}") from error


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state, each in memory of its own.

    Raises:
        ValueError: it can't be read as tensors alone, or holds something else.
    """
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of as many kinds as there are ways to damage a pickle
        said = one_line(error).split(" (1)")[0]
        raise ValueError(f"{file} can't be read as tensors alone: {said}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{file}: expected tensors by name, got {shown(state)}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: expected a tensor, got {shown(tensor)} for {name!r}")
    # Weights that are tied share memory, which safetensors does not.
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
