"""sentence-transformers' modules.json: what a CrossEncoder consists of, and the modules behind its
encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTextEncoding

from rerank_fast.model.modular.modules import Float32Linear, make_module
from rerank_fast.model.modular.pooling import Pooling
from rerank_fast.model.modular.reranker import (
    LOGITS,
    TOKENS,
    Entry,
    ModularReranker,
    output_path,
)
from rerank_fast.model.storage.activations import is_torchs, make_activation
from rerank_fast.model.storage.files import Checkpoint, named
from rerank_fast.model.storage.weights import header
from rerank_fast.model.texts import shown

TRANSFORMER_CONFIG = "sentence_bert_config.json"
# Settings of a Transformer that change what is read of a text, in ways that nothing here follows.
_UNREAD = ("query_expansion", "tokenizer_name_or_path")


def read_entries(checkpoint: Checkpoint) -> list[Entry]:
    """The modules that modules.json names, each with its config; [] where there is none.

    Raises:
        ValueError: it is damaged, or names files outside of the checkpoint.
    """
    modules = checkpoint.read_json("modules.json", list) or []
    entries: list[Entry] = []
    for index, module in enumerate(modules):
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise ValueError(
                f"{checkpoint.name}/modules.json: expected objects with a type, got {shown(module)}"
            )
        if not module["type"].startswith("sentence_transformers."):
            raise ValueError(
                f"{checkpoint.name}/modules.json has the module {module['type']}: expected "
                "sentence-transformers' own"
            )
        kwargs = module.get("kwargs") or []
        if not isinstance(kwargs, list):
            raise ValueError(
                f"{checkpoint.name}/modules.json: expected kwargs to be a list of names, got "
                f"{shown(kwargs)}"
            )
        path, name = module.get("path") or "", str(module.get("name", index))
        file = TRANSFORMER_CONFIG
        if path:
            place = checkpoint.inside(path, "modules.json")
            file = f"{place}/{'config.json' if entries else TRANSFORMER_CONFIG}"
        config = checkpoint.read_json(file) or {}
        entries.append(Entry(name, module["type"], path, config, tuple(kwargs)))
    return entries


def is_modular(entries: Sequence[Entry]) -> bool:
    """Whether there is more behind the Transformer than what reads the logits of answers."""
    return [entry.kind for entry in entries[1:]] not in ([], ["LogitScore"])


def encoder_loader(checkpoint: Checkpoint, entries: Sequence[Entry], config: Any) -> Any:
    """The class of transformers that opens the encoder of a modular CrossEncoder.

    Raises:
        ValueError: the first module is none that can be opened here; says why.
    """
    first, where = entries[0], f"{checkpoint.name}/{TRANSFORMER_CONFIG}"
    if first.kind != "Transformer":
        raise ValueError(
            f"{checkpoint.name}/modules.json: expected a Transformer as the first module, got "
            f"{first.type}"
        )
    for name in _UNREAD:
        if first.config.get(name):
            raise ValueError(f"{where}: {name} is not supported, got {shown(first.config[name])}")
    text_limit(where, first.config)
    task = first.config.get("transformer_task", "feature-extraction")
    if task == "feature-extraction":
        return AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
    if task == "sequence-classification":
        return AutoModelForSequenceClassification
    raise ValueError(
        f"{where}: expected the transformer_task feature-extraction, got {shown(task)}"
    )


def text_limit(where: str, config: Mapping[str, Any]) -> int | None:
    """The max_length of a Transformer's processing_kwargs, which is before the tokenizer's own.

    Raises:
        ValueError: they change what is read of a text in another way.
    """
    kwargs = config.get("processing_kwargs") or {}
    expected = (
        "expected processing_kwargs of text alone, with max_length, and padding and truncation "
        f"that are true, got {shown(kwargs)}"
    )
    if not isinstance(kwargs, dict) or kwargs.keys() - {"text"}:
        raise ValueError(f"{where}: {expected}")
    text = kwargs.get("text") or {}
    known = {"padding": (True, "longest"), "truncation": (True, "longest_first")}
    if not isinstance(text, dict) or text.keys() - {"max_length", *known}:
        raise ValueError(f"{where}: {expected}")
    limit = text.get("max_length")
    if limit is not None and (type(limit) is not int or limit < 4):
        raise ValueError(f"{where}: expected max_length to be at least 4, got {shown(limit)}")
    if any(text.get(name, True) not in values for name, values in known.items()):
        raise ValueError(f"{where}: {expected}")
    return limit


def assemble(checkpoint: Checkpoint, entries: Sequence[Entry], encoder: Any) -> ModularReranker:
    """The encoder with the modules behind it, whose weights are read.

    Raises:
        ValueError: a module is damaged or unknown, or they don't give one score together; says
            which.
    """
    where = f"{checkpoint.name}/{TRANSFORMER_CONFIG}"
    modalities = entries[0].config.get("modality_config") or {}
    text = modalities.get("text") or {} if isinstance(modalities, dict) else modalities
    if not isinstance(text, dict):
        raise ValueError(f"{where}: expected a modality_config of objects, got {shown(modalities)}")
    classifies = entries[0].config.get("transformer_task") == "sequence-classification"
    usual = LOGITS if classifies else TOKENS
    path = output_path(text.get("method_output_name", usual[0]))
    name = entries[0].config.get("module_output_name", usual[1])
    if text.get("method", "forward") != "forward" or path is None or not isinstance(name, str):
        raise ValueError(
            f"{where}: expected the output {usual[0][0]} of the method forward, got {shown(text)}"
        )
    modules = [_read_module(checkpoint, entry, encoder.dtype) for entry in entries[1:]]
    if not all(_is_ours(module) for module in modules):
        # Of what theirs add to the features, as the weights of words, their Pooling takes account.
        modules = [
            _theirs(checkpoint, entry) if isinstance(module, Pooling) else module
            for entry, module in zip(entries[1:], modules, strict=True)
        ]
    model = ModularReranker(encoder, modules, entries, (path, name)).eval()
    _check_score(checkpoint, model)
    return model


def _read_module(checkpoint: Checkpoint, entry: Entry, dtype: torch.dtype) -> nn.Module:
    where = f"{checkpoint.name}/{entry.path}/config.json"
    if not entry.path:
        raise ValueError(
            f"{checkpoint.name}/modules.json: expected a path for the module {entry.type}"
        )

    def activation(name: Any) -> nn.Module:
        if not isinstance(name, str) or not is_torchs(name):
            raise ValueError(f"expected an activation of torch.nn, got {shown(name)}")
        return make_activation(name, "it")

    with named(where):
        module = make_module(entry.kind, dict(entry.config), activation)
    file = checkpoint.file(f"{entry.path}/model.safetensors")
    if file is None and checkpoint.file(f"{entry.path}/pytorch_model.bin") is not None:
        raise ValueError(
            f"{checkpoint.name}/{entry.path} has pickled weights, which are not loaded: "
            "rerank-fast convert writes them as safetensors"
        )
    if module is None:
        return _theirs(checkpoint, entry).to(dtype)
    expected = module.state_dict()
    if expected or file is not None:
        found = {} if file is None else (header(file), load_file(file))[1]
        _check_module(f"{checkpoint.name}/{entry.path}/model.safetensors", found, expected)
        module.load_state_dict(found)
    return module.to(dtype)


def _check_module(where: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if found.keys() != expected.keys():
        raise ValueError(f"{where}: expected the weights {_joined(expected)}, got {_joined(found)}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{where}: {name} is {tuple(tensor.shape)} in the weights and "
                f"{tuple(expected[name].shape)} by the config"
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: the weight {name} has values that are no finite floats")


def _joined(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def _theirs(checkpoint: Checkpoint, entry: Entry) -> nn.Module:
    """A module that sentence-transformers alone has, loaded by it where it is installed."""
    try:
        from sentence_transformers.base.modules import Module
    except ImportError as error:
        raise ValueError(
            f"{checkpoint.name} has the module {entry.type}, which needs pip install "
            "sentence-transformers"
        ) from error
    place, _, name = entry.type.rpartition(".")
    with named(f"the module {entry.type} of {checkpoint.name} can't be loaded"):
        kind = getattr(import_module(place), name)
        if not (isinstance(kind, type) and issubclass(kind, Module)):
            raise ValueError("it is no module of sentence-transformers")
        options: Any = {"token": checkpoint.token, "revision": checkpoint.revision}
        return kind.load(checkpoint.name, subfolder=entry.path, **options)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("rerank_fast.")


@torch.no_grad()
def _check_score(checkpoint: Checkpoint, model: ModularReranker) -> None:
    """Whether the modules give one score a text, tried with two texts of two tokens."""
    mask, where = torch.ones(2, 2, dtype=torch.int64), f"{checkpoint.name}/modules.json"
    shapes = {TOKENS: (2, 2, model.config.hidden_size), LOGITS: (2, model.config.num_labels)}
    ours = all(_is_ours(module) for module in model.head)
    with named(f"{where}: the modules give no score"):
        if ours and model.output in shapes:  # which spares a large encoder's forward
            zeros = torch.zeros(shapes[model.output], dtype=model.encoder.dtype)
            features = {model.output[1]: zeros, "attention_mask": mask}
            for module in model.head:
                features = module(features)
            scores = features["scores"]
        else:
            scores = model(input_ids=torch.zeros_like(mask), attention_mask=mask).logits
    if scores.dim() == 2 and scores.shape[1] > 1:
        raise ValueError(
            f"{checkpoint.name} has {scores.shape[1]} labels; expected modules that give 1 score"
        )
    if scores.shape not in ((2, 1), (2,)):
        raise ValueError(
            f"{where}: the modules give scores of the shape {tuple(scores.shape)} for 2 texts; "
            "expected (2, 1)"
        )


def keep_in_fp32(where: str, model: nn.Module, entries: Sequence[Entry], names: Any) -> list[str]:
    """Let the named linear layers compute in fp32, and give it, whatever the dtype around them.

    Args:
        where: for errors.
        model: a Hugging Face model or a ModularReranker.
        entries: its modules.
        names: of layers as sentence-transformers has them: "2.linear", "0.model.classifier".

    Raises:
        ValueError: a name is not that of an nn.Linear.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{where}: expected keep_in_fp32_modules to be a list of names, got {shown(names)}"
        )
    first = f"{entries[0].name if entries else 0}.model"
    places: dict[str, Any] = {first: model}
    if isinstance(model, ModularReranker):
        behind = {entry.name: module for entry, module in zip(entries[1:], model.head, strict=True)}
        places = {first: model.encoder, **behind}
    for name in names:
        found: Any = None
        for place, module in places.items():
            if name.startswith(f"{place}."):
                found = dict(module.named_modules()).get(name.removeprefix(f"{place}."))
        if type(found) not in (nn.Linear, Float32Linear):
            raise ValueError(
                f"{where}: keep_in_fp32_modules names {name}, which is no nn.Linear of the model"
            )
        found.__class__ = Float32Linear
    return names
