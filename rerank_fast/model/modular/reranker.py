"""An encoder and the modules behind it as one model, which the rest takes for a sequence
classifier.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

_HEAD, _ENCODER = "head.", "encoder."
# Of the encoder's outputs: the path to one, and its name among the features.
Output = tuple[tuple[str | int, ...], str]
TOKENS: Output = (("last_hidden_state",), "token_embeddings")
LOGITS: Output = (("logits",), "scores")


def output_path(name: Any) -> tuple[str | int, ...] | None:
    """The path to an output that sentence-transformers' method_output_name gives: a name, or
    several and indices; None where it is something else.
    """
    path = (name,) if isinstance(name, str) else name
    if not isinstance(path, list | tuple) or not path:
        return None
    return tuple(path) if all(type(one) in (str, int) for one in path) else None


@dataclass(frozen=True)
class Entry:
    """A module as modules.json has it, and its own config.json."""

    name: str
    type: str  # its class, with the path of its Python module
    path: str  # of its folder; empty for that of the model
    config: Mapping[str, Any]
    kwargs: Sequence[str] = ()

    @property
    def kind(self) -> str:
        return self.type.rpartition(".")[2]


class ModularReranker(nn.Module):
    """Runs an encoder on a padded batch and its modules on what comes out; the last of them gives
    the scores.

    Args:
        encoder: a Hugging Face model.
        head: the modules behind it, this package's or sentence-transformers'.
        entries: of the encoder and of each module, as they are saved; none for a view of somebody
            else's model.
        output: what the modules read of the encoder.
    """

    base_model_prefix = "encoder"  # as of transformers' models

    def __init__(
        self,
        encoder: Any,
        head: Sequence[nn.Module],
        entries: Sequence[Entry] = (),
        output: Output = TOKENS,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.ModuleList(head)
        self.entries, self.output, self.training = tuple(entries), output, encoder.training
        parameters = inspect.signature(encoder.forward).parameters
        self._accepted = parameters.keys() - {"kwargs"}

    @property
    def base_model(self) -> Any:
        return self.encoder

    @property
    def config(self) -> Any:
        return self.encoder.config

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """(B, 1) logits of a padded batch of input_ids, attention_mask and, where there are any,
        token_type_ids.
        """
        path, name = self.output
        called: dict[str, Any] = {
            key: value for key, value in inputs.items() if key in self._accepted
        }
        if "hidden_states" in path:
            called["output_hidden_states"] = True
        encoded = self.encoder(**called, return_dict=True)
        features: dict[str, Any] = {**inputs, name: functools.reduce(getitem, path, encoded)}
        if getattr(self.config, "output_hidden_states", False) and "hidden_states" in encoded:
            features["all_layer_embeddings"] = encoded["hidden_states"]
        for module in self.head:
            features = module(features)
        return SequenceClassifierOutput(logits=features["scores"])

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def save_pretrained(
        self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the encoder's files, and each module's weights in its folder; the configs are the
        caller's.
        """
        state = self.state_dict() if state_dict is None else state_dict
        encoder = {
            name.removeprefix(_ENCODER): one
            for name, one in state.items()
            if name.startswith(_ENCODER)
        }
        self.encoder.save_pretrained(directory, state_dict=encoder)
        module: Any
        for index, (entry, module) in enumerate(zip(self.entries[1:], self.head, strict=True)):
            folder = Path(directory, entry.path)
            folder.mkdir(parents=True, exist_ok=True)
            if hasattr(module, "save"):  # sentence-transformers' own
                module.save(str(folder), safe_serialization=True)
                continue
            prefix = f"{_HEAD}{index}."
            tensors = {
                name.removeprefix(prefix): one.detach().contiguous()
                for name, one in state.items()
                if name.startswith(prefix)
            }
            if tensors:
                save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
