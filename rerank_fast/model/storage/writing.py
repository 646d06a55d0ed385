"""Writing model directories that Hugging Face and sentence-transformers read."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import __version__ as transformers_version

from rerank_fast.model.card import CARD_FILE, Card
from rerank_fast.model.modular.reranker import Entry
from rerank_fast.model.packed.heads import Answers
from rerank_fast.model.storage.files import SENTENCE_TRANSFORMERS_CONFIG, quiet_transformers
from rerank_fast.model.storage.modules import TRANSFORMER_CONFIG
from rerank_fast.model.storage.tokenizer import TokenizerSettings
from rerank_fast.model.texts import check_text, one_line

logger = logging.getLogger(__name__)


_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What transformers would add, of a model that lay there before, to the one that is saved.
_STALE = (*_ADAPTER, "added_tokens.json", "special_tokens_map.json")


def holds_model(directory: Path) -> bool:
    """Whether a directory has a config, weights, an adapter or a README that a save would
    replace.
    """
    return any(
        (directory / name).exists() for name in ("config.json", CARD_FILE, *_ADAPTER)
    ) or any(directory.glob("*.safetensors"))


def save(
    model: Any,
    tokenizer: Any,
    activation_fn: object,
    max_length: int | None,
    card: Card,
    directory: Path,
    *,
    tokenizer_settings: TokenizerSettings,
    entries: Sequence[Entry],
    answers: Answers | None,
    encoder_decoder: bool,
    prompts: Mapping[str, str],
    default_prompt_name: str | None,
    keep_in_fp32_modules: list[str],
    overwrite: bool,
) -> None:
    """Write a model directory; files appear in it only once all of them are written."""
    if not overwrite and holds_model(directory):
        raise ValueError(
            f"{directory} already holds a model or a README.md; pass overwrite=True (--overwrite) "
            "to replace it"
        )
    for name, prompt in prompts.items():
        check_text(prompt, f"prompt {name!r}")
    if default_prompt_name is not None and default_prompt_name not in prompts:
        raise ValueError(
            f"default_prompt_name is {default_prompt_name!r}: expected None or one of {[*prompts]}"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    except OSError as error:
        raise ValueError(f"can't write a model to {directory}: {error}") from error
    try:
        with quiet_transformers():
            model.save_pretrained(staging)
            tokenizer_settings.save(tokenizer, staging, max_length)
        files = _module_files(entries or _plain_entries(answers, encoder_decoder), max_length)
        files[SENTENCE_TRANSFORMERS_CONFIG] = _settings(
            activation_fn, prompts, default_prompt_name, keep_in_fp32_modules
        )
        for name, content in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        card.write(staging)
        for name in _STALE:
            (directory / name).unlink(missing_ok=True)
        mode = (staging / "modules.json").stat().st_mode
        for file in sorted(path for path in staging.rglob("*") if path.is_file()):
            file.chmod(mode)  # safetensors makes its files the owner's alone
            target = directory / file.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    except Exception as error:
        # tokenizers has no kind of its own for what the system refuses.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise ValueError(f"can't write a model to {directory}: {one_line(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _settings(
    activation_fn: object,
    prompts: Mapping[str, str],
    default_prompt_name: str | None,
    keep_in_fp32_modules: list[str],
) -> dict[str, Any]:
    kind = type(activation_fn)
    if not kind.__module__.startswith("torch.nn.modules."):
        logger.warning(
            "The activation %s is not one of torch.nn: the saved model opens with Sigmoid.",
            activation_fn,
        )
    settings = {
        "__version__": {"pytorch": torch.__version__, "transformers": transformers_version},
        "activation_fn": f"{kind.__module__}.{kind.__qualname__}",
        "default_prompt_name": default_prompt_name,
        "model_type": "CrossEncoder",
        "prompts": dict(prompts),
    }
    return settings | (
        {"keep_in_fp32_modules": keep_in_fp32_modules} if keep_in_fp32_modules else {}
    )


def _module_files(entries: Sequence[Entry], max_length: int | None) -> dict[str, Any]:
    """modules.json and each module's config."""
    files: dict[str, Any] = {TRANSFORMER_CONFIG: _limited(entries[0].config, max_length)}
    files |= {f"{entry.path}/config.json": dict(entry.config) for entry in entries[1:]}
    files["modules.json"] = [
        {"idx": index, "name": entry.name, "path": entry.path, "type": entry.type}
        | ({"kwargs": list(entry.kwargs)} if entry.kwargs else {})
        for index, entry in enumerate(entries)
    ]
    return files


def _limited(config: Mapping[str, Any], max_length: int | None) -> dict[str, Any]:
    """A Transformer's config; where it names a limit, which goes before the tokenizer's, this
    one.
    """
    limited = dict(config)
    if limited.get("max_seq_length") is not None:
        limited["max_seq_length"] = max_length
    text = (limited.get("processing_kwargs") or {}).get("text") or {}
    if text.get("max_length") is not None:
        limited["processing_kwargs"] = {"text": {**text, "max_length": max_length}}
    return limited


def _plain_entries(answers: Answers | None, encoder_decoder: bool) -> list[Entry]:
    """The modules of a Hugging Face model that gives the score itself, or the logits of answers."""
    transformer = "sentence_transformers.base.modules.transformer.Transformer"
    output = {"method": "forward", "method_output_name": "logits"}
    if answers is None:
        config: dict[str, Any] = {
            "transformer_task": "sequence-classification",
            "modality_config": {"text": output},
            "module_output_name": "scores",
        }
        return [Entry("0", transformer, "", config)]
    config = {
        # Of the second sentence-transformers knows nothing, and says so.
        "transformer_task": "text2text-generation" if encoder_decoder else "text-generation",
        "modality_config": {"text": output, "message": output | {"format": "flat"}},
        "module_output_name": "causal_logits",
    }
    score = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
    return [
        Entry("0", transformer, "", config),
        Entry(
            "1", score, "1_LogitScore", {**asdict(answers), "module_input_name": "causal_logits"}
        ),
    ]
