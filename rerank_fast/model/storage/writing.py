"""Writing model directories that Hugging Face and sentence-transformers read."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import __version__ as transformers_version

from rerank_fast.model.card import CARD_FILE, Card
from rerank_fast.model.heads import Answers
from rerank_fast.model.storage.files import SENTENCE_TRANSFORMERS_CONFIG, quiet_transformers
from rerank_fast.model.storage.tokenizer import TokenizerSettings
from rerank_fast.model.texts import one_line

logger = logging.getLogger(__name__)


def holds_model(directory: Path) -> bool:
    """Whether a directory has a config, weights or a README that a save would replace."""
    return any((directory / name).exists() for name in ("config.json", CARD_FILE)) or any(
        directory.glob("*.safetensors")
    )


def save(
    model: Any,
    tokenizer: Any,
    activation_fn: object,
    max_length: int | None,
    card: Card,
    directory: Path,
    *,
    tokenizer_settings: TokenizerSettings,
    answers: Answers | None,
    prompts: Mapping[str, str],
    default_prompt_name: str | None,
    overwrite: bool,
) -> None:
    """Write a model directory; files appear in it only once all of them are written."""
    if not overwrite and holds_model(directory):
        raise ValueError(
            f"{directory} already holds a model or a README.md; pass overwrite=True (--overwrite) to replace it"
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
        files = _sentence_transformers_files(activation_fn, answers, prompts, default_prompt_name)
        for name, content in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        card.write(staging)
        mode = (staging / "modules.json").stat().st_mode
        for file in sorted(path for path in staging.rglob("*") if path.is_file()):
            file.chmod(mode)  # safetensors makes its files the owner's alone
            target = directory / file.relative_to(staging)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
    except Exception as error:
        # tokenizers has no kind of its own for what the system refuses.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise ValueError(f"can't write a model to {directory}: {one_line(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sentence_transformers_files(
    activation_fn: object, answers: Answers | None, prompts: Mapping[str, str], default_prompt_name: str | None
) -> dict[str, Any]:
    """What sentence-transformers 6 reads beside the Hugging Face files."""
    kind = type(activation_fn)
    if not kind.__module__.startswith("torch.nn.modules."):
        logger.warning(
            "The activation %s is not one of torch.nn: the saved model opens with Sigmoid.", activation_fn
        )
    modules = ["sentence_transformers.base.modules.transformer.Transformer"]
    transformer: dict[str, Any] = {
        "transformer_task": "sequence-classification",
        "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
        "module_output_name": "scores",
    }
    files: dict[str, Any] = {}
    if answers is not None:
        modules.append("sentence_transformers.cross_encoder.modules.logit_score.LogitScore")
        output = {"method": "forward", "method_output_name": "logits"}
        transformer = {
            "transformer_task": "text-generation",
            "modality_config": {"text": output, "message": output | {"format": "flat"}},
            "module_output_name": "causal_logits",
        }
        files["1_LogitScore/config.json"] = {**asdict(answers), "module_input_name": "causal_logits"}
    return files | {
        "modules.json": [
            {
                "idx": index,
                "name": str(index),
                "path": f"{index}_{name.rpartition('.')[2]}" if index else "",
                "type": name,
            }
            for index, name in enumerate(modules)
        ],
        "sentence_bert_config.json": transformer,
        SENTENCE_TRANSFORMERS_CONFIG: {
            "__version__": {"pytorch": torch.__version__, "transformers": transformers_version},
            "activation_fn": f"{kind.__module__}.{kind.__qualname__}",
            "default_prompt_name": default_prompt_name,
            "model_type": "CrossEncoder",
            "prompts": dict(prompts),
        },
    }
