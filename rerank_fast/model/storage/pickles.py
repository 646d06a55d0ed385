"""Pickled weights to safetensors: read as tensors and nothing else, because the user asked for
it.
"""

from __future__ import annotations

import json
import os
import pickle
import re
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
    """Weights of a model directory that are pickled, its modules' too; none that safetensors stand
    beside, which are what is opened.
    """
    return sorted(
        path
        for path in directory.rglob("*.bin")
        if path.name.startswith(_WEIGHTS) and not _has_safetensors(path)
    )


def _has_safetensors(path: Path) -> bool:
    kind = "adapter_model" if path.name.startswith("adapter_model") else "model"
    names = (f"{kind}.safetensors", f"{kind}.safetensors.index.json")
    return any(path.with_name(name).exists() for name in names)


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
        ValueError: source is no directory, has no pickled weights that lack safetensors beside
            them, or one of them holds more than tensors.
    """
    if not source.is_dir():
        raise ValueError(
            f"expected a local model directory, got {source}; hf download brings one of the hub"
        )
    found = pickled_weights(source)
    if not found:
        there = any(path.name.startswith(_WEIGHTS) for path in source.rglob("*.bin"))
        also = ": there are safetensors of them, which are what is opened" if there else ""
        raise ValueError(f"{source} has no pickled weights (pytorch_model.bin) to convert{also}")
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
            if not place.with_name("model.safetensors").exists() and not place.exists():
                renamed = json.dumps(_renamed_index(index), indent=2) + "\n"
                place.write_text(renamed, encoding="utf-8")
        try:
            check(staging)
        except ValueError as error:  # it is the user's directory that has the fault
            said = str(error).replace(str(staging), str(source))
            raise ValueError(f"what was read as tensors opens as no reranker: {said}") from error
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
        raise ValueError(f"{file} can't be read as tensors alone: {_reason(error)}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{file}: expected tensors by name, got {shown(state)}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: expected a tensor, got {shown(tensor)} for {name!r}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{file}: expected a dense tensor, got {kind} for {name!r}")
    # Weights that are tied share memory, which safetensors does not.
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def _reason(error: Exception) -> str:
    """Why torch refused, without its advice to run the pickle's code."""
    if not isinstance(error, pickle.UnpicklingError):
        return one_line(error)
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it names {found[1]}" if found else "it is damaged, or holds something else"
