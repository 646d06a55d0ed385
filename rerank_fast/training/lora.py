"""LoRA through PEFT: adapters put into a model in place, saved merged and on their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.training.config import TrainingConfig

ADAPTER = "adapter"  # directory of the adapter beside the merged model


def add_lora(model: CrossEncoder, settings: TrainingConfig) -> Any:
    """Put adapters into the linear layers of the encoder; they and the score head are what remains to train.

    In place, so that the model keeps its class and runs packed. Returns PEFT's configuration.

    Raises:
        ValueError: PEFT is not installed, or no module has one of the names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("LoRA needs PEFT: pip install 'rerank-fast[lora]'") from error
    inner = model.model
    above = [(name, part) for name, part in inner.named_children() if name != inner.base_model_prefix]
    heads = [name for name, part in above if next(part.parameters(), None) is not None]
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules or _linear_names(inner.base_model),
        # The head's own layers may bear the names of the encoder's.
        exclude_modules=[
            f"{head}.{name}".rstrip(".")
            for head in heads
            for name, part in getattr(inner, head).named_modules()
            if type(part) is nn.Linear
        ],
        modules_to_save=heads,
        base_model_name_or_path=model.name_or_path,
    )
    trained_whole = config.modules_to_save
    # The head is trained itself: a second copy of it, as PEFT makes, would not be the head that is run packed.
    config.modules_to_save = None
    inject_adapter_in_model(config, inner)
    config.modules_to_save = trained_whole
    for name in heads:
        getattr(inner, name).requires_grad_(True)
    return config


def _linear_names(encoder: nn.Module) -> list[str]:
    names = {name.rpartition(".")[2] for name, part in encoder.named_modules() if type(part) is nn.Linear}
    return sorted(names)


@torch.no_grad()
def merged_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state without adapters: each one added to its weight, which itself stays as it is."""
    from peft.tuners.lora import LoraLayer

    state = dict(state)
    for name, part in model.named_modules():
        if isinstance(part, LoraLayer):
            weight = f"{name}.base_layer.weight"
            state[weight] = state[weight] + _delta(part).to(state[weight].dtype)
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def _delta(part: Any) -> Tensor:
    return part.get_delta_weight("default")


class WithState:
    """What is saved in place of a model: the same one with other tensors."""

    def __init__(self, model: Any, state: Mapping[str, Tensor]) -> None:
        self._model, self._state = model, state

    def save_pretrained(self, directory: Path) -> None:
        self._model.save_pretrained(directory, state_dict=dict(self._state))


def save_lora(
    model: CrossEncoder, config: Any, directory: Path, state: Mapping[str, Tensor], *, overwrite: bool
) -> None:
    """Write the merged model, which loads everywhere, and in adapter/ what PEFT loads onto the base model.

    The state is that of model.model, adapters and all.
    """
    from safetensors.torch import save_file

    merged = WithState(model.model, merged_weights(model.model, state))
    model.save_as(directory, directory.resolve().name, overwrite=overwrite, model=merged)
    adapter = directory / ADAPTER
    adapter.mkdir(exist_ok=True)
    # PEFT's own names: base_model.model.<parameter>, without the adapter's.
    kept = {
        f"base_model.model.{name.replace('.default.', '.')}": value.contiguous()
        for name, value in state.items()
        if ".lora_" in name or name.split(".")[0] in config.modules_to_save
    }
    save_file(kept, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(adapter))
