"""Weights of a checkpoint: safetensors files only, whole, inside of it, and of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rerank_fast.model.storage.files import Checkpoint
from rerank_fast.model.texts import one_line, shown

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a checkpoint; none, where it has none."""

    files: list[Path]
    dtypes: dict[str, str]  # of each tensor, as safetensors calls it

    def read(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: tensor for file in self.files for name, tensor in load_file(file).items()}


def check_weight_files(checkpoint: Checkpoint, named: Any) -> WeightFiles:
    """The files of the checkpoint's weights, of which the headers are read.

    Args:
        named: the file that config.json names as `transformers_weights`; None for the usual ones.

    Raises:
        ValueError: a file is damaged or missing, or not a safetensors file in the checkpoint.
    """
    if named is None:
        first = next((name for name in (_FILE, _INDEX) if checkpoint.file(name) is not None), None)
        if first is None:
            return WeightFiles([], {})
    else:
        first = checkpoint.inside(named, "config.json")
        if not first.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(
                f"{checkpoint.name}/config.json: expected safetensors weights, pickled ones are "
                f"not loaded: got {shown(named)}"
            )
    _check_adapter(checkpoint)
    names = _shards(checkpoint, first) if first.endswith(".json") else [first]
    found = WeightFiles([], {})
    for name in names:
        file = checkpoint.file(name)
        if file is None:
            where = first if first.endswith(".json") else "config.json"
            raise ValueError(f"{checkpoint.name} has no {name}, which its {where} names")
        found.files.append(file)
        found.dtypes.update(header(file))
    return found


def _check_adapter(checkpoint: Checkpoint) -> None:
    """An adapter beside the model is loaded with it, from a pickle where there is no other file."""
    if checkpoint.file("adapter_config.json") is not None:
        file = checkpoint.file("adapter_model.safetensors")
        if file is None:
            raise ValueError(
                f"{checkpoint.name} has an adapter_config.json and no adapter_model.safetensors; "
                "pickled weights are not loaded: rerank-fast convert --model "
                f"{checkpoint.name} --output DIR writes them as safetensors"
            )
        header(file)


def _shards(checkpoint: Checkpoint, name: str) -> list[str]:
    """The files that an index names."""
    index = checkpoint.read_json(name)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{checkpoint.name}/{name}: expected a weight_map of names and files, got "
            f"{shown(weight_map)}"
        )
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(
            f"{checkpoint.name}/{name}: expected metadata, an object, got "
            f"{shown(index.get('metadata'))}"
        )
    for shard in weight_map.values():
        if not checkpoint.inside(shard, name).endswith(".safetensors"):
            raise ValueError(
                f"{checkpoint.name}/{name}: expected safetensors files, pickled weights are not "
                f"loaded: got {shown(shard)}"
            )
    return sorted(set(weight_map.values()))


def header(file: Path) -> dict[str, str]:
    """The dtype of each tensor in a safetensors file.

    Raises:
        ValueError: it is damaged, or none.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        said = one_line(error).removeprefix("SafetensorError: ")
        raise ValueError(f"{file} is damaged or no safetensors file: {said}") from error


def check_weights(
    name: str,
    model: Any,
    dtypes: dict[str, str],
    mismatched: Iterable[tuple[str, Any, Any]],
) -> None:
    """What safetensors files can hold and a model can't.

    Args:
        name: of the checkpoint.
        dtypes: of the tensors in its files.
        mismatched: weights whose shape is another than the model's: (name, its shape, the model's).

    Raises:
        ValueError: a weight has another shape than config.json says, is of integers, or has a NaN
            or an infinite value; names the weight.
    """
    for weight, shape, expected in sorted(mismatched, key=str):
        raise ValueError(
            f"{name}: config.json and the weights disagree: {weight} is {tuple(shape)} in the "
            f"weights and {tuple(expected)} in the model"
        )
    parameters = dict(model.named_parameters())
    for weight, dtype in dtypes.items():
        # Buffers may be integers, as the numbers of positions that older checkpoints hold.
        if not dtype.startswith(("F", "BF")) and any(
            _is_same(weight, other) for other in parameters
        ):
            raise ValueError(
                f"{name}: the weight {weight} is of the type {dtype}; expected a float type"
            )
    for weight, values in parameters.items():
        if values.numel():
            low, high = torch.aminmax(values.detach())  # one pass, no copy; NaN is both of them
            if not (torch.isfinite(low) and torch.isfinite(high)):
                what = "NaN" if torch.isnan(low) else "infinite"
                # Which may be narrower than the file's.
                kind = str(values.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{name}: the weight {weight} has a value that is {what} in {kind}"
                )


def _is_same(weight: str, other: str) -> bool:
    """Whether a name in a file is that in a model, but for the part before the first dots."""
    return weight == other or weight.endswith(f".{other}") or other.endswith(f".{weight}")
