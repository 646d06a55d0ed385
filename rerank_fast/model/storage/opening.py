"""The model of a checkpoint: its config and its weights, an adapter's merged into them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from rerank_fast.model.modular.reranker import Entry
from rerank_fast.model.storage.adapters import has_adapter, merged
from rerank_fast.model.storage.files import Checkpoint, named
from rerank_fast.model.storage.modules import assemble, encoder_loader, is_modular
from rerank_fast.model.storage.names import check_encoder, unwrapped
from rerank_fast.model.storage.weights import check_weight_files, check_weights
from rerank_fast.model.texts import one_line, shown

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Encoder-decoders that are rerankers as language models; others, as BART, classify.
_ENCODER_DECODERS = tuple(f"{kind}ForConditionalGeneration" for kind in ("T5", "MT5", "UMT5"))


def language_model(config: Any) -> Any:
    """The class of transformers that opens a model which answers with a token; None for another."""
    first = (config.architectures or [""])[0]
    if first in _ENCODER_DECODERS:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM if first.endswith("ForCausalLM") else None


def open_model(
    checkpoint: Checkpoint,
    encoder: Checkpoint,
    base: Checkpoint,
    config: Any,
    entries: Sequence[Entry],
    dtype: str | torch.dtype | None,
    options: dict[str, Any],
) -> tuple[Any, set[str]]:
    """The model, and the weights of its head that start from random values.

    Args:
        checkpoint: of the modules.
        encoder: of their Transformer, and of the adapter where base is another one.
        base: of config.json and the weights.
        config: the base's.
        entries: sentence-transformers' modules; none for a Hugging Face model.
        dtype: of the weights; None keeps the files' own.
        options: of from_pretrained.

    Raises:
        ValueError: a file is missing or damaged, the encoder lacks weights, or there is more than
            one label.
    """
    name, modular = base.name, is_modular(entries)
    architectures = config.architectures or []
    labelled = (
        any(one.endswith("ForSequenceClassification") for one in architectures) and not modular
    )
    if labelled and config.num_labels != 1:
        raise ValueError(
            f"{name} has {config.num_labels} labels; expected a sequence-classification model with "
            "1"
        )
    loader: Any = AutoModelForSequenceClassification
    if modular:
        loader = encoder_loader(checkpoint, entries, config)
    elif language_model(config) is not None:
        loader = language_model(config)
    else:
        config.num_labels = 1
    files = check_weight_files(base, getattr(config, "transformers_weights", None))
    model, report = _model(base, loader, config, dtype, {**base.hub, **options})
    beside = base is encoder and has_adapter(base)
    if beside or report["missing_keys"]:
        with named(name):
            names = unwrapped(files.dtypes, model.state_dict(), model.base_model_prefix)
        # An adapter that lies beside it, transformers has put into the model unmerged.
        if beside or any(own != as_saved for as_saved, own in names.items()):
            tensors = {names[one]: tensor for one, tensor in files.read().items()}
            kind, options = type(model), {**options, "state_dict": tensors}
            model, report = _model(base, kind, config, dtype, options)
    missing = set(report["missing_keys"])
    check_encoder(name, model, missing, files.dtypes)
    if not modular:
        _check_labels(name, model, report["mismatched_keys"])
    check_weights(name, model, files.dtypes, report["mismatched_keys"])
    if beside or base is not encoder:
        model, missing = merged(encoder, base, model, missing)
        check_weights(encoder.name, model, {}, ())
    # The pooler of an encoder whose tokens are read is none of the head.
    return (assemble(checkpoint, entries, model), set()) if modular else (model, missing)


def check_place(checkpoint: Checkpoint) -> None:
    """That a name is that of a directory, or can be one of the hub's."""
    name = checkpoint.name
    if name and checkpoint.is_local:
        if not Path(name).is_dir():
            raise ValueError(f"expected a model directory with a config.json, got the file {name}")
    elif not checkpoint.may_be_on_hub:
        name = name or "''"  # of a shell's variable that is not set
        raise ValueError(f"model directory {name} does not exist, and it is no hub id (user/name)")


def read_config(checkpoint: Checkpoint, options: dict[str, Any], *, check_dtype: bool) -> Any:
    """What config.json says, of the types that are read here.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    name = checkpoint.name
    if checkpoint.is_local and not Path(name, "config.json").is_file():
        raise ValueError(f"expected a model directory with a config.json, got {name}")
    check_place(checkpoint)
    if checkpoint.is_local:
        checkpoint.read_json("config.json")
    try:
        config = AutoConfig.from_pretrained(name, **{**checkpoint.hub, **options})
    except OSError as error:
        raise ValueError(_explain(name, error)) from error
    except Exception as error:  # of as many kinds as there are values in a config
        said = f"{name}/config.json can't be read as a model's: {one_line(error)}"
        raise ValueError(said) from error
    architectures = config.architectures
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(one, str) for one in architectures)
    ):
        raise ValueError(
            f"{name}/config.json: expected architectures to be names, got {shown(architectures)}"
        )
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
    """The model, of files or of a state_dict, and transformers' report: missing_keys,
    mismatched_keys.
    """
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
            raise ValueError(
                f"{name} has {shape[0]} labels; expected a sequence-classification model with 1"
            )


def _explain(path_or_hub_id: str, error: Exception) -> str:
    said = one_line(error)
    if Path(path_or_hub_id).exists():
        if "no file named model.safetensors" in str(error):
            return (
                f"{path_or_hub_id} has no safetensors weights, and pickled weights are not "
                f"loaded: rerank-fast convert --model {path_or_hub_id} --output DIR reads them as "
                "tensors alone, and writes safetensors"
            )
        return (
            f"{path_or_hub_id} can't be opened as a sequence-classification model; config.json and "
            f"the weights make none: {said}"
        )
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
    state = "the hub is switched off (HF_HUB_OFFLINE)" if offline else "the hub did not give it"
    return f"model {path_or_hub_id} is no local directory, and {state}: {said}"
