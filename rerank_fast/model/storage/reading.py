"""Reading model directories and models of the hub, as Hugging Face and sentence-transformers save them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rerank_fast.model.card import CARD_FILE, Card, read_card
from rerank_fast.model.heads import Answers
from rerank_fast.model.storage.files import (
    SENTENCE_TRANSFORMERS_CONFIG,
    optional_file,
    quiet_transformers,
    read_json,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """What a checkpoint holds; activation_fn is None where it names none."""

    model: Any
    tokenizer: Any
    max_length: int  # the saved limit of a pair in tokens
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
    """Open a checkpoint with one label; see CrossEncoder."""
    hub = {"trust_remote_code": trust_remote_code, "revision": revision, "token": token}
    directory = Path(path_or_hub_id)
    if directory.exists() and not (directory / "config.json").is_file():
        raise ValueError(f"expected a model directory with a config.json, got {path_or_hub_id}")
    if not directory.exists() and (path_or_hub_id.count("/") > 1 or path_or_hub_id.startswith((".", "/", "~"))):
        raise ValueError(f"model directory {path_or_hub_id} does not exist")
    try:
        config = AutoConfig.from_pretrained(path_or_hub_id, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(_explain(path_or_hub_id, error)) from error
    saved = read_json(path_or_hub_id, SENTENCE_TRANSFORMERS_CONFIG, revision, token) or {}
    is_reranker = saved.get("model_type") == "CrossEncoder"  # else its prompts and modules are an embedder's
    modules = read_json(path_or_hub_id, "modules.json", revision, token) or []
    names = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if is_reranker and not {*names} <= {"Transformer", "LogitScore"}:
        raise ValueError(
            f"{path_or_hub_id} is a CrossEncoder of the modules {', '.join(names)}; expected one whose score head "
            "is the Hugging Face model's own, or LogitScore"
        )
    prompts, default_prompt_name = (
        saved.get(name) if is_reranker else None for name in ("prompts", "default_prompt_name")
    )
    if default_prompt_name is not None and default_prompt_name not in (prompts or {}):
        raise ValueError(
            f"{path_or_hub_id} names the default prompt {default_prompt_name}, but has {[*(prompts or {})]}"
        )
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
        try:
            model, report = loader.from_pretrained(
                path_or_hub_id,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
                **hub,
            )
            tokenizer = AutoTokenizer.from_pretrained(path_or_hub_id, **hub)
        except (OSError, ValueError) as error:
            raise ValueError(_explain(path_or_hub_id, error)) from error
    answers = _answers(path_or_hub_id, tokenizer, modules, revision, token) if causal else None
    missing = sorted(report["missing_keys"])
    if missing:
        logger.warning(
            "%s has no trained score head: %s start from random values, so train before you rank.",
            path_or_hub_id,
            ", ".join(missing),
        )
    if tokenizer.pad_token_id is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    positions = _max_positions(config)
    return LoadedModel(
        model,
        tokenizer,
        int(min(tokenizer.model_max_length, positions or math.inf)),
        positions,
        None if missing else _saved_activation(path_or_hub_id, config, saved),
        _saved_card(path_or_hub_id, revision, token),
        not missing,
        answers,
        prompts or {},
        default_prompt_name,
    )


def _explain(path_or_hub_id: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(path_or_hub_id).exists():
        if "safetensors" in str(error):
            return f"{path_or_hub_id} has no safetensors weights, and pickled weights are not loaded: {first_line}"
        return f"{path_or_hub_id} can't be opened as a sequence-classification model: {first_line}"
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
    state = "the hub is switched off (HF_HUB_OFFLINE)" if offline else "the hub did not give it"
    return f"model {path_or_hub_id} is no local directory, and {state}: {first_line}"


def _max_positions(config: Any) -> int | None:
    """How many tokens the model has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return None
    # RoBERTa and its kin count positions from pad + 1, so that many of the embeddings are never used.
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet"):
        positions -= (config.pad_token_id or 0) + 1
    return int(positions)


def _answers(
    path_or_hub_id: str,
    tokenizer: Any,
    modules: list[dict[str, Any]],
    revision: str | None,
    token: str | bool | None,
) -> Answers:
    """The tokens that a causal model answers with: those that sentence-transformers saved, else yes and no."""
    for module in modules:
        if str(module.get("type", "")).endswith(".LogitScore"):
            saved = read_json(path_or_hub_id, f"{module['path']}/config.json", revision, token)
            return Answers(saved["true_token_id"], saved.get("false_token_id"))
    vocabulary = tokenizer.get_vocab()
    if "yes" not in vocabulary or "no" not in vocabulary:
        raise ValueError(
            f"{path_or_hub_id} is a causal language model whose tokenizer has no token yes or no; expected these, "
            "or a LogitScore module as sentence-transformers saves it"
        )
    return Answers(vocabulary["yes"], vocabulary["no"])


def _saved_activation(
    path_or_hub_id: str, config: Any, saved: Mapping[str, Any]
) -> Callable[[Tensor], Tensor] | None:
    """The activation that sentence-transformers saved, in any of the places its versions used."""
    saved = {**(getattr(config, "sentence_transformers", None) or {}), **saved}
    name = saved.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    if name is None:
        return None
    # A name in a config must not run code of its choosing: PyTorch's activations only.
    module, _, attribute = name.rpartition(".")
    kind = getattr(import_module(module), attribute, None) if module.startswith("torch.nn.modules.") else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        logger.warning(
            "%s names the activation %s, which is not one of torch.nn; using Sigmoid.", path_or_hub_id, name
        )
        return None
    return kind()


def _saved_card(path_or_hub_id: str, revision: str | None, token: str | bool | None) -> Card | None:
    file = optional_file(path_or_hub_id, CARD_FILE, revision, token)
    if file is None:
        return None
    directory = Path(path_or_hub_id)
    return read_card(file, directory.resolve().name if directory.exists() else path_or_hub_id)


