"""Reading models that transformers or sentence-transformers saved, local ones and the hub's."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rerank_fast.model.card import CARD_FILE, Card, read_card
from rerank_fast.model.modular.reranker import ModularReranker
from rerank_fast.model.packed.heads import Answers
from rerank_fast.model.padded import padding_token
from rerank_fast.model.storage.activations import is_torchs, make_activation
from rerank_fast.model.storage.adapters import adapter_base
from rerank_fast.model.storage.answers import find_answers
from rerank_fast.model.storage.files import (
    SENTENCE_TRANSFORMERS_CONFIG,
    Checkpoint,
    quiet_transformers,
)
from rerank_fast.model.storage.modules import (
    TRANSFORMER_CONFIG,
    keep_in_fp32,
    read_entries,
    text_limit,
)
from rerank_fast.model.storage.names import named_shortly
from rerank_fast.model.storage.opening import (
    check_place,
    language_model,
    open_model,
    read_config,
)
from rerank_fast.model.storage.positions import max_positions
from rerank_fast.model.storage.tokenizer import TokenizerSettings, load_tokenizer, lower_case
from rerank_fast.model.texts import check_text, shown
from rerank_fast.model.tokens.tokenization import carries_pairs

logger = logging.getLogger(__name__)


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
    answers: Answers | None  # of a language model
    prompts: dict[str, str]  # by name
    default_prompt_name: str | None
    keep_in_fp32_modules: list[str]  # linear layers, by sentence-transformers' names


def load(
    path_or_hub_id: str,
    *,
    dtype: str | torch.dtype | None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_folder: str | Path | None = None,
    local_files_only: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
    config_kwargs: Mapping[str, Any] | None = None,
    keep_in_fp32_modules: list[str] | None = None,
    template: str | None = None,
    answers: str | tuple[str, str] | None = None,
) -> LoadedModel:
    """Open a checkpoint with one label; see CrossEncoder.

    Args:
        template: chat template of a language model, in the place of its tokenizer's.
        answers: the words that a language model answers with, in the place of those of its files.

    Raises:
        ValueError: a file is missing, damaged, holds something else than is expected of it, or
            names a file outside of the checkpoint; says which.
    """
    code = {"trust_remote_code": trust_remote_code}
    checkpoint = Checkpoint(path_or_hub_id, revision, token, cache_folder, local_files_only)
    check_place(checkpoint)
    saved = checkpoint.read_json(SENTENCE_TRANSFORMERS_CONFIG) or {}
    # Else its prompts and modules are an embedder's.
    is_reranker = saved.get("model_type") == "CrossEncoder"
    entries = read_entries(checkpoint) if is_reranker else []
    encoder = checkpoint.folder(entries[0].path) if entries else checkpoint
    base = adapter_base(encoder) or encoder
    options = {**code, **(config_kwargs or {})}
    config = _config_of(encoder, base, options, check_dtype=dtype is None)
    if entries:  # it is saved in the model's own directory, as sentence-transformers saves it
        entries[0] = replace(entries[0], path="")
    prompts, default_prompt_name = check_prompts(
        (is_reranker and saved.get("prompts")) or {},
        saved.get("default_prompt_name") if is_reranker else None,
        f"{checkpoint.name}/{SENTENCE_TRANSFORMERS_CONFIG}",
    )
    with quiet_transformers():
        options = {**code, **(model_kwargs or {})}
        model, untrained = open_model(checkpoint, encoder, base, config, entries, dtype, options)
        own_tokenizer = base is encoder or encoder.file("tokenizer_config.json") is not None
        options = {**code, **(processor_kwargs or {})}
        tokenizer = load_tokenizer(encoder if own_tokenizer else base, model, options)
    if untrained:
        logger.warning(
            "%s has no trained score head: %s start from random values, so train before you rank.",
            path_or_hub_id,
            named_shortly(untrained),
        )
    answers_of: Answers | None = None
    if not isinstance(model, ModularReranker) and language_model(config) is not None:
        answers_of = find_answers(checkpoint.name, tokenizer, config, entries, answers)
    elif template is not None or answers is not None:
        raise ValueError(
            f"{path_or_hub_id} is no language model: expected template=None and answers=None"
        )
    if template is not None:
        _set_template(tokenizer, template)
    fp32, where = keep_in_fp32_modules, checkpoint.name
    if fp32 is None:
        fp32 = saved.get("keep_in_fp32_modules") or []
        where = f"{checkpoint.name}/{SENTENCE_TRANSFORMERS_CONFIG}"
    fp32 = keep_in_fp32(where, model, entries, fp32)
    _take_padding_token(model, tokenizer)
    positions = max_positions(path_or_hub_id, model)
    settings = entries[0].config if entries else {}
    max_length = _longest(checkpoint, tokenizer, settings, positions)
    if settings.get("do_lower_case"):
        lower_case(tokenizer)
    return LoadedModel(
        model,
        tokenizer,
        TokenizerSettings.of(tokenizer),
        max_length,
        positions,
        _saved_activation(checkpoint, config, saved) if not untrained else None,
        _saved_card(checkpoint),
        not untrained,
        answers_of,
        prompts,
        default_prompt_name,
        fp32,
    )


def _config_of(
    encoder: Checkpoint, base: Checkpoint, options: dict[str, Any], *, check_dtype: bool
) -> Any:
    """What the base's config.json says; a fault of it names the adapter that is opened on it."""
    try:
        return read_config(base, options, check_dtype=check_dtype)
    except ValueError as error:
        if base is encoder:
            raise
        what = f"{encoder.name} holds a PEFT adapter of {base.name} and no model"
        raise ValueError(f"{what}: {error}") from error


def _take_padding_token(model: Any, tokenizer: Any) -> None:
    """The tokenizer's padding token for a model that knows none."""
    pad, rows = tokenizer.pad_token_id, getattr(model.config, "vocab_size", None)
    # transformers may have given the tokenizer one that the model has no embedding for.
    if pad is not None and padding_token(model) is None and not (rows and pad >= rows):
        model.config.pad_token_id = pad


def _set_template(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = check_text(template, "template")
    if not carries_pairs(tokenizer):
        raise ValueError(
            "template can't carry a pair: expected a chat template that renders messages of the "
            f"roles query and document, got {shown(template)}"
        )


def _longest(
    checkpoint: Checkpoint, tokenizer: Any, settings: Mapping[str, Any], positions: int | None
) -> int | None:
    """The saved limit of a pair in tokens: the Transformer's own before the tokenizer's, and the
    model's positions at most.
    """
    limit = text_limit(f"{checkpoint.name}/{TRANSFORMER_CONFIG}", settings)
    limit = limit or settings.get("max_seq_length") or tokenizer.model_max_length
    limits = [
        one for one in (limit, positions) if isinstance(one, int | float) and one < sys.maxsize
    ]
    return int(min(limits, default=0)) or None


def check_prompts(prompts: Any, default: Any, where: str) -> tuple[dict[str, str], str | None]:
    """Prompts by name, and the name of the default one.

    Raises:
        ValueError: they are no texts, or the default is none of them; begins with the place.
    """
    if not isinstance(prompts, dict):
        raise ValueError(f"{where}: expected prompts to be texts by name, got {shown(prompts)}")
    for name, prompt in prompts.items():
        check_text(prompt, f"{where}, prompt {name!r}")
    if default is not None and not (isinstance(default, str) and default in prompts):
        raise ValueError(f"{where} names the default prompt {default}, but has {[*prompts]}")
    return prompts, default


def _saved_activation(
    checkpoint: Checkpoint, config: Any, saved: dict[str, Any]
) -> Callable[[Tensor], Tensor] | None:
    """The activation that sentence-transformers saved, in any of the places its versions used."""
    older = getattr(config, "sentence_transformers", None) or {}
    if not isinstance(older, dict):
        raise ValueError(
            f"{checkpoint.name}/config.json: expected sentence_transformers to be an object, got "
            f"{shown(older)}"
        )
    places = {
        SENTENCE_TRANSFORMERS_CONFIG: saved.get("activation_fn"),
        "config.json": older.get("activation_fn")
        or getattr(config, "sbert_ce_default_activation_function", None),
    }
    file, name = next(((file, name) for file, name in places.items() if name), ("", None))
    if name is None:
        return None
    where = f"{checkpoint.name}/{file}"
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected the name of an activation, got {shown(name)}")
    # A name in a config must not run code of its choosing: PyTorch's activations only.
    if not is_torchs(name):
        logger.warning(
            "%s names the activation %.60r, which is not one of torch.nn; using Sigmoid.",
            checkpoint.name,
            name,
        )
        return None
    return make_activation(name, where)


def _saved_card(checkpoint: Checkpoint) -> Card | None:
    file = checkpoint.file(CARD_FILE)
    if file is None:
        return None
    directory = Path(checkpoint.name)
    return read_card(file, directory.resolve().name if directory.exists() else checkpoint.name)
