"""Directories that hold a PEFT adapter and no model: opened on the model that they were trained
on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rerank_fast.model.storage.files import Checkpoint, named
from rerank_fast.model.storage.weights import header
from rerank_fast.model.texts import shown

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_base(checkpoint: Checkpoint) -> Checkpoint | None:
    """The model that an adapter is of, where the checkpoint holds nothing else.

    Raises:
        ValueError: the adapter names no model, or has no safetensors weights.
    """
    try:
        config = (
            None if checkpoint.file("config.json") is not None else checkpoint.read_json(_CONFIG)
        )
    except OSError:  # there is no such model: whoever reads its config says why
        return None
    if config is None:
        return None
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{checkpoint.name} holds a PEFT adapter and no model, and its {_CONFIG} names none: "
            f"expected base_model_name_or_path, got {shown(base)}"
        )
    if checkpoint.file(_WEIGHTS) is None:
        raise ValueError(
            f"{checkpoint.name} holds a PEFT adapter of {base} without {_WEIGHTS}; pickled weights "
            "are not loaded"
        )
    return replace(checkpoint, name=base, revision=None)


def merged(
    checkpoint: Checkpoint, base: Checkpoint, model: Any, missing: set[str]
) -> tuple[Any, set[str]]:
    """The model with the adapter merged into its weights, and the weights that neither of the two
    has.

    Raises:
        ValueError: PEFT is not installed, or the adapter is none of this model.
    """
    what = f"{checkpoint.name} holds a PEFT adapter of {base.name} and no model"
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{what}: pip install 'rerank-fast[lora]' opens it") from error
    file = checkpoint.file(_WEIGHTS)
    assert file is not None
    brought = {name.removeprefix("base_model.model.") for name in header(file)}
    unknown = sorted(
        name for name in brought if ".lora_" not in name and name not in model.state_dict()
    )
    with named(f"{what}; it does not fit there"):
        if unknown:
            raise ValueError(f"the model has no weight {unknown[0]}")
        adapted = PeftModel.from_pretrained(model, checkpoint.name, **checkpoint.hub)
        return adapted.merge_and_unload().eval(), missing - brought
