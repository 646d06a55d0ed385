"""LoRA through PEFT: adapters put into a model in place, saved merged and on their own, and taken
out again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.modular.reranker import ModularReranker
from rerank_fast.training.config import TrainingConfig

ADAPTER = "adapter"  # directory of the adapter beside the merged model
_NAME = "default"  # PEFT's, of the one adapter


def add_lora(model: CrossEncoder, settings: TrainingConfig) -> Any:
    """Put adapters into the linear layers of the encoder; they and the score head are what remains
    to train.

    Of a language model, whose head is its vocabulary, the adapters alone. In place, so that the
    model keeps its class and runs packed. Returns PEFT's tuner.

    Raises:
        ValueError: PEFT is not installed, no module has one of the names, or one that does is no
            nn.Linear.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ValueError("LoRA needs PEFT: pip install 'rerank-fast[lora]'") from error
    inner = model.model
    heads = _heads(inner)
    # A language model's is the vocabulary, which may be the word embeddings too: it stays as it is.
    trained_whole = None if model.answers is not None else heads
    targets = settings.lora_target_modules or _linear_names(inner.base_model, heads)
    _check_targets(inner, targets, heads)
    config = LoraConfig(
        task_type=_task(model),
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        # The head's own layers may bear the names of the encoder's.
        exclude_modules=[
            f"{head}.{name}".rstrip(".")
            for head in heads
            for name, part in getattr(inner, head).named_modules()
            if type(part) is nn.Linear
        ],
        base_model_name_or_path=model.name_or_path,
    )
    tuner = LoraModel(inner, config, _NAME)
    # Only now: the head is trained itself. A second copy of it, as PEFT makes, would not be the
    # head that is run packed.
    config.modules_to_save = trained_whole
    for name in trained_whole or []:
        getattr(inner, name).requires_grad_(True)
    return tuner


def _task(model: CrossEncoder) -> str:
    """As PEFT calls it."""
    if model.answers is None:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if model.model.config.is_encoder_decoder else "CAUSAL_LM"


def _heads(model: Any) -> list[str]:
    """The modules above the encoder that have weights; of an encoder-decoder the vocabulary."""
    if model.base_model is model:
        vocabulary = model.get_output_embeddings()
        return [name for name, part in model.named_children() if part is vocabulary]
    return [
        name
        for name, part in model.named_children()
        if name != model.base_model_prefix and next(part.parameters(), None) is not None
    ]


def remove_lora(tuner: Any) -> None:
    """Add the adapters to their weights and take them out, in place."""
    tuner.merge_and_unload()
    vars(tuner.model).pop("peft_config", None)  # an older PEFT leaves it there


def _check_targets(model: nn.Module, targets: list[str], heads: list[str]) -> None:
    if not targets:
        raise ValueError(
            f"LoRA needs nn.Linear modules, and the encoder of this {type(model).__name__} has none"
        )
    encoder = {
        name: part for name, part in model.named_modules() if name.partition(".")[0] not in heads
    }
    for target in targets:
        found = {name: part for name, part in encoder.items() if f".{name}".endswith(f".{target}")}
        if not found:
            linear = sorted(
                {
                    one.rpartition(".")[2]
                    for one, part in encoder.items()
                    if isinstance(part, nn.Linear)
                }
            )
            raise ValueError(
                f"lora_target_modules: the encoder has no module {target!r}; its nn.Linear are "
                f"{', '.join(linear)}"
            )
        # Packed execution reads the weights of the others past an adapter.
        other = [
            f"{name} ({type(part).__name__})"
            for name, part in found.items()
            if not isinstance(part, nn.Linear)
        ]
        if other:
            raise ValueError(
                f"lora_target_modules must name nn.Linear modules, got {target!r}, which is "
                f"{', '.join(other[:3])}"
            )


def _linear_names(encoder: nn.Module, heads: list[str]) -> list[str]:
    names = {
        name.rpartition(".")[2]
        for name, part in encoder.named_modules()
        if type(part) is nn.Linear and name not in heads
    }
    return sorted(names)


@torch.no_grad()
def merged_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state without adapters: each one added to its weight, which itself stays as it
    is.
    """
    from peft.tuners.lora import LoraLayer

    state = dict(state)
    for name, part in model.named_modules():
        if isinstance(part, LoraLayer):
            weight = f"{name}.base_layer.weight"
            state[weight] = state[weight] + _delta(part).to(state[weight].dtype)
    return {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_" not in name
    }


def _delta(part: Any) -> Tensor:
    return part.get_delta_weight(_NAME)


class WithState:
    """What is saved in place of a model: the same one with other tensors."""

    def __init__(self, model: Any, state: Mapping[str, Tensor]) -> None:
        self._model, self._state = model, state

    def save_pretrained(self, directory: Path) -> None:
        self._model.save_pretrained(directory, state_dict=dict(self._state))


def save_lora(
    model: CrossEncoder,
    tuner: Any,
    directory: Path,
    state: Mapping[str, Tensor],
    *,
    overwrite: bool,
) -> None:
    """Write the merged model, which loads everywhere, and in adapter/ what PEFT loads onto the base
    model.

    The state is that of model.model, adapters and all.
    """
    from safetensors.torch import save_file

    config = tuner.peft_config[_NAME]
    above = ""
    if isinstance(
        model.model, ModularReranker
    ):  # PEFT loads it onto the encoder, which its directory holds
        above = f"{model.model.base_model_prefix}."
        config = dataclasses.replace(
            config, task_type="FEATURE_EXTRACTION", modules_to_save=None, exclude_modules=None
        )
    merged = WithState(model.model, merged_weights(model.model, state))
    model.save_as(directory, directory.resolve().name, overwrite=overwrite, model=merged)
    adapter = directory / ADAPTER
    adapter.mkdir(exist_ok=True)
    # PEFT's own names: base_model.model.<parameter>, without the adapter's.
    kept = {
        "base_model.model."
        + name.removeprefix(above).replace(f".{_NAME}.", "."): value.contiguous()
        for name, value in state.items()
        if ".lora_" in name or name.split(".")[0] in (config.modules_to_save or [])
    }
    weights = adapter / "adapter_model.safetensors"
    save_file(kept, weights, metadata={"format": "pt"})
    config.save_pretrained(str(adapter))
    # safetensors makes its files the owner's alone.
    weights.chmod((adapter / "adapter_config.json").stat().st_mode)
