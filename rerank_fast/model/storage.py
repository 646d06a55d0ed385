"""Model directories: reading Hugging Face and sentence-transformers checkpoints, writing both at once."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import __version__ as transformers_version
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from rerank_fast.model.card import CARD_FILE, Card, read_card
from rerank_fast.model.heads import Answers

logger = logging.getLogger(__name__)

_SENTENCE_TRANSFORMERS_CONFIG = "config_sentence_transformers.json"


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


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and load report: what matters of it is said in our own words."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


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
    saved = _read_json(path_or_hub_id, _SENTENCE_TRANSFORMERS_CONFIG, revision, token) or {}
    is_reranker = saved.get("model_type") == "CrossEncoder"  # else its prompts and modules are an embedder's
    modules = _read_json(path_or_hub_id, "modules.json", revision, token) or []
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
    with _quiet_transformers():
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


def _read_json(path_or_hub_id: str, name: str, revision: str | None, token: str | bool | None) -> Any:
    """A file of a checkpoint; None where there is none."""
    file = _optional_file(path_or_hub_id, name, revision, token)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


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
            saved = _read_json(path_or_hub_id, f"{module['path']}/config.json", revision, token)
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


def _optional_file(path_or_hub_id: str, name: str, revision: str | None, token: str | bool | None) -> str | None:
    """Where a file of the checkpoint is; None if it has none."""
    file: str | None = cached_file(
        path_or_hub_id,
        name,
        revision=revision,
        token=token,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return file


def _saved_card(path_or_hub_id: str, revision: str | None, token: str | bool | None) -> Card | None:
    file = _optional_file(path_or_hub_id, CARD_FILE, revision, token)
    if file is None:
        return None
    directory = Path(path_or_hub_id)
    return read_card(file, directory.resolve().name if directory.exists() else path_or_hub_id)


def holds_model(directory: Path) -> bool:
    """Whether a directory has a config, weights or a README that a save would replace."""
    return any((directory / name).exists() for name in ("config.json", CARD_FILE)) or any(
        directory.glob("*.safetensors")
    )


def save(
    model: Any,
    tokenizer: Any,
    activation_fn: object,
    max_length: int,
    card: Card,
    directory: Path,
    *,
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
        with _quiet_transformers():
            model.save_pretrained(staging)
            tokenizer_limit = tokenizer.model_max_length
            tokenizer.model_max_length = max_length
            try:
                tokenizer.save_pretrained(staging)
            finally:
                tokenizer.model_max_length = tokenizer_limit
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
    except OSError as error:
        raise ValueError(f"can't write a model to {directory}: {error}") from error
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
        _SENTENCE_TRANSFORMERS_CONFIG: {
            "__version__": {"pytorch": torch.__version__, "transformers": transformers_version},
            "activation_fn": f"{kind.__module__}.{kind.__qualname__}",
            "default_prompt_name": default_prompt_name,
            "model_type": "CrossEncoder",
            "prompts": dict(prompts),
        },
    }


def create_repository(repo_id: str, *, private: bool, token: str | bool | None) -> None:
    """Make the model repository on the hub, where there is none yet.

    Raises:
        ValueError: the id is not one, the hub is offline, or it refuses.
    """
    with _hub_errors(repo_id):
        HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True)


def push(save_to: Callable[[Path], None], repo_id: str, *, private: bool, token: str | bool | None) -> str:
    """Save to a temporary directory and upload that; returns the commit's URL."""
    create_repository(repo_id, private=private, token=token)
    with tempfile.TemporaryDirectory() as directory:
        save_to(Path(directory))
        with _hub_errors(repo_id):
            commit = HfApi(token=token).upload_folder(
                repo_id=repo_id, folder_path=directory, commit_message="Upload a reranker with rerank_fast"
            )
    return str(commit.commit_url)


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """The hub's refusals as one line that names the repository; none of them holds the token."""
    try:
        yield
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        if isinstance(error, OfflineModeIsEnabled):
            raise ValueError(f"can't push to {repo_id}: the hub is offline (HF_HUB_OFFLINE)") from error
        raise ValueError(f"can't push to {repo_id}: {' '.join(str(error).split())[:400]}") from error
