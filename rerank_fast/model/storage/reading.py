"""Reading models that transformers or sentence-transformers saved, local ones and the hub's."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rerank_fast.model.card import CARD_FILE, Card, read_card
from rerank_fast.model.heads import Answers
from rerank_fast.model.storage.files import (
    SENTENCE_TRANSFORMERS_CONFIG,
    Checkpoint,
    named,
    quiet_transformers,
)
from rerank_fast.model.storage.names import check_missing, in_encoder, unwrapped
from rerank_fast.model.storage.positions import max_positions
from rerank_fast.model.storage.tokenizer import TokenizerSettings, load_tokenizer
from rerank_fast.model.storage.weights import check_weight_files, check_weights
from rerank_fast.model.texts import check_text, one_line, shown

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LoadedModel:
    """What a checkpoint holds; activation_fn is None where it names none."""

    model: Any
    tokenizer: Any
    tokenizer_settings: TokenizerSettings
    max_length: int | None  # the saved limit of a pair in tokens; None where there is none
    max_positions: int | None  # tokens the model has positions for; None where it has no such limit
    activation_fn: Callable[[Tensor], Tensor] | None
    card: Card | None  # README.md; of the encoder where the checkpoint has no trained head
    has_head: bool
    answers: Answers | None  # of a causal language model
    prompts: dict[str, str]  # by name
    default_prompt_name: str | None


def load(
    path_or_hub_id: str,
    *,
    dtype: str | torch.dtype | None,
    trust_remote_code: bool,
    revision: str | None,
    token: str | bool | None,
) -> LoadedModel:
    """Open a checkpoint with one label; see CrossEncoder.

    Raises:
        ValueError: a file is missing, damaged, holds something else than is expected of it, or
            names a file outside of the checkpoint; says which.
    """
    hub: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "revision": revision,
        "token": token,
    }
    checkpoint = Checkpoint(path_or_hub_id, revision, token)
    config = _config(checkpoint, hub, check_dtype=dtype is None)
    saved = checkpoint.read_json(SENTENCE_TRANSFORMERS_CONFIG) or {}
    # Else its prompts and modules are an embedder's.
    is_reranker = saved.get("model_type") == "CrossEncoder"
    modules = _modules(checkpoint, is_reranker)
    prompts, default_prompt_name = _prompts(checkpoint, saved) if is_reranker else ({}, None)
    architectures = config.architectures or []
    has_head = any(name.endswith("ForSequenceClassification") for name in architectures)
    if has_head and config.num_labels != 1:
        raise ValueError(
            f"{path_or_hub_id} has {config.num_labels} labels; expected a sequence-classification model with 1"
        )
    causal = bool(architectures) and architectures[0].endswith("ForCausalLM")
    if not causal:
        config.num_labels = 1
    loader: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    with quiet_transformers():
        files = check_weight_files(checkpoint, getattr(config, "transformers_weights", None))
        dtypes = files.dtypes
        model, report = _model(checkpoint, loader, config, dtype, hub)
        if in_encoder(model, report["missing_keys"]):
            names = unwrapped(dtypes, model.state_dict(), model.base_model_prefix)
            tensors = {names[name]: tensor for name, tensor in files.read().items()}
            model, report = _model(checkpoint, type(model), config, dtype, {"state_dict": tensors})
        missing = report["missing_keys"]
        check_missing(path_or_hub_id, model, missing, dtypes)
        _check_labels(path_or_hub_id, model, report["mismatched_keys"])
        check_weights(path_or_hub_id, model, dtypes, report["mismatched_keys"])
        tokenizer = load_tokenizer(checkpoint, model, hub)
    answers = _answers(checkpoint, tokenizer, modules) if causal else None
    if tokenizer.pad_token_id is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    positions = max_positions(path_or_hub_id, model)
    limits = [one for one in (tokenizer.model_max_length, positions) if one is not None and one < sys.maxsize]
    return LoadedModel(
        model,
        tokenizer,
        TokenizerSettings.of(tokenizer),
        int(min(limits, default=0)) or None,
        positions,
        None if missing else _saved_activation(checkpoint, config, saved),
        _saved_card(checkpoint),
        not missing,
        answers,
        prompts,
        default_prompt_name,
    )


def _config(checkpoint: Checkpoint, hub: dict[str, Any], *, check_dtype: bool) -> Any:
    """What config.json says, of the types that are read here."""
    name = checkpoint.name
    if checkpoint.is_local and not Path(name, "config.json").is_file():
        raise ValueError(f"expected a model directory with a config.json, got {name}")
    if not checkpoint.is_local and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"model directory {name} does not exist")
    if checkpoint.is_local:
        checkpoint.read_json("config.json")
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except OSError as error:
        raise ValueError(_explain(name, error)) from error
    except Exception as error:  # of as many kinds as there are values in a config
        said = f"{name}/config.json can't be read as a model's: {one_line(error)}"
        raise ValueError(said) from error
    architectures = config.architectures
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(one, str) for one in architectures)
    ):
        raise ValueError(f"{name}/config.json: expected architectures to be names, got {shown(architectures)}")
    if check_dtype and config.dtype is not None and config.dtype not in _DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in _DTYPES)
        raise ValueError(f"{name}/config.json: expected the dtype {names}, got {config.dtype}")
    return config


def _model(
    checkpoint: Checkpoint,
    loader: Any,
    config: Any,
    dtype: str | torch.dtype | None,
    options: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The model, of files or of a state_dict, and transformers' report: missing_keys, mismatched_keys."""
    try:
        return loader.from_pretrained(
            None if "state_dict" in options else checkpoint.name,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            # The error without it says no weight's name; the report does.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of as many kinds as there are values in a config
        raise ValueError(_explain(checkpoint.name, error)) from error


def _check_labels(name: str, model: Any, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """That a head which config.json says nothing of has one label."""
    for weight, shape, expected in sorted(mismatched, key=str):
        in_head = not weight.startswith(f"{model.base_model_prefix}.")
        if in_head and expected[0] == 1 and shape[1:] == expected[1:]:
            raise ValueError(f"{name} has {shape[0]} labels; expected a sequence-classification model with 1")


def _explain(path_or_hub_id: str, error: Exception) -> str:
    said = one_line(error)
    if Path(path_or_hub_id).exists():
        if "no file named model.safetensors" in str(error):
            return f"{path_or_hub_id} has no safetensors weights, and pickled weights are not loaded: {said}"
        return (
            f"{path_or_hub_id} can't be opened as a sequence-classification model; config.json and "
            f"the weights make none: {said}"
        )
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
    state = "the hub is switched off (HF_HUB_OFFLINE)" if offline else "the hub did not give it"
    return f"model {path_or_hub_id} is no local directory, and {state}: {said}"


def _modules(checkpoint: Checkpoint, is_reranker: bool) -> list[dict[str, Any]]:
    """sentence-transformers' modules, each with its type."""
    modules = checkpoint.read_json("modules.json", list) or []
    for module in modules:
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise ValueError(f"{checkpoint.name}/modules.json: expected objects with a type, got {shown(module)}")
    names = [module["type"].rpartition(".")[2] for module in modules]
    if is_reranker and not {*names} <= {"Transformer", "LogitScore"}:
        raise ValueError(
            f"{checkpoint.name} is a CrossEncoder of the modules {', '.join(names)}; expected one whose "
            "score head is the Hugging Face model's own, or LogitScore"
        )
    return modules


def _prompts(checkpoint: Checkpoint, saved: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """The prompts by name, and the name of the default one."""
    where = f"{checkpoint.name}/{SENTENCE_TRANSFORMERS_CONFIG}"
    prompts, default = saved.get("prompts") or {}, saved.get("default_prompt_name")
    if not isinstance(prompts, dict):
        raise ValueError(f"{where}: expected prompts to be texts by name, got {shown(prompts)}")
    for name, prompt in prompts.items():
        check_text(prompt, f"{where}, prompt {name!r}")
    if default is not None and not (isinstance(default, str) and default in prompts):
        raise ValueError(f"{where} names the default prompt {default}, but has {[*prompts]}")
    return prompts, default


def _answers(checkpoint: Checkpoint, tokenizer: Any, modules: list[dict[str, Any]]) -> Answers:
    """The tokens that a causal model answers with: those that were saved, else yes and no."""
    for module in modules:
        if module["type"].endswith(".LogitScore"):
            file = f"{checkpoint.inside(module.get('path'), 'modules.json')}/config.json"
            saved = checkpoint.read_json(file) or {}
            answers: list[Any] = [saved.get("true_token_id"), saved.get("false_token_id")]
            known = [type(one) is int and 0 <= one < len(tokenizer) for one in answers]
            if not known[0] or not (known[1] or answers[1] is None):
                raise ValueError(
                    f"{checkpoint.name}/{file}: expected true_token_id and false_token_id below "
                    f"{len(tokenizer)}, the tokens of the vocabulary, got {answers[0]!r:.40} and {answers[1]!r:.40}"
                )
            return Answers(*answers)
    vocabulary = tokenizer.get_vocab()
    if "yes" not in vocabulary or "no" not in vocabulary:
        raise ValueError(
            f"{checkpoint.name} is a causal language model whose tokenizer has no token yes or no; "
            "expected these, or a LogitScore module as sentence-transformers saves it"
        )
    return Answers(vocabulary["yes"], vocabulary["no"])


def _saved_activation(
    checkpoint: Checkpoint, config: Any, saved: dict[str, Any]
) -> Callable[[Tensor], Tensor] | None:
    """The activation that sentence-transformers saved, in any of the places its versions used."""
    older = getattr(config, "sentence_transformers", None) or {}
    if not isinstance(older, dict):
        raise ValueError(
            f"{checkpoint.name}/config.json: expected sentence_transformers to be an object, got {shown(older)}"
        )
    places = {
        SENTENCE_TRANSFORMERS_CONFIG: saved.get("activation_fn"),
        "config.json": older.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None),
    }
    file, name = next(((file, name) for file, name in places.items() if name), ("", None))
    if name is None:
        return None
    where = f"{checkpoint.name}/{file}"
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected the name of an activation, got {shown(name)}")
    # A name in a config must not run code of its choosing: PyTorch's activations only.
    module, _, attribute = name.rpartition(".")
    if module != "torch.nn" and not module.startswith("torch.nn.modules."):
        logger.warning(
            "%s names the activation %s, which is not one of torch.nn; using Sigmoid.", checkpoint.name, name
        )
        return None
    with named(f"{where} names the activation {name}, which torch can't give"):
        kind = getattr(import_module(module), attribute)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError("it is no torch.nn.Module")
        activation: Callable[[Tensor], Tensor] = kind()
        activation(torch.zeros(1))  # of one score, as of any number of them
    return activation


def _saved_card(checkpoint: Checkpoint) -> Card | None:
    file = checkpoint.file(CARD_FILE)
    if file is None:
        return None
    directory = Path(checkpoint.name)
    return read_card(file, directory.resolve().name if directory.exists() else checkpoint.name)
