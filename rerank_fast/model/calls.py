"""Arguments of sentence-transformers' CrossEncoder under older names, and those that decide nothing
here.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from rerank_fast.model.texts import shown

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

_OLDER = {"sentences": "inputs", "activation_fct": "activation_fn"}
# What a tokenizer's own threads do; a softmax over one label; what rank() always returns.
_WITHOUT_EFFECT = ("num_workers", "apply_softmax", "convert_to_numpy", "convert_to_tensor")
# Their processes, one a device; score_file and the Trainer score in several of their own.
_UNSERVED = ("device", "pool", "chunk_size")


def with_older_names(method: F) -> F:
    """The method, called by the arguments of today's or of older releases of
    sentence-transformers.
    """
    names = inspect.signature(method).parameters

    @functools.wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        for older, name in _OLDER.items():
            if older in options and name in names:
                if name in options:
                    raise TypeError(
                        f"{method.__name__}() got both {name} and its older name {older}"
                    )
                _say_older(method.__name__, older, name)
                options[name] = options.pop(older)
        for name in _WITHOUT_EFFECT:
            if name not in names:
                options.pop(name, None)
        if options.get("device") is not None and _is_device(self.device, options["device"]):
            options.pop("device")
        for name in _UNSERVED:
            if options.pop(name, None) is not None:
                raise ValueError(
                    f"{method.__name__}() scores in one process on {self.device}, the model's "
                    f"device: expected no {name}; model.to() moves it"
                )
        return method(self, *args, **options)

    return call  # type: ignore[return-value]


def _is_device(own: torch.device, asked: Any) -> bool:
    """Whether a device that is asked for is the model's own: cuda is cuda:0 too."""
    try:
        asked = torch.device(asked)
    except (RuntimeError, TypeError):
        return False
    return asked.type == own.type and (asked.index or 0) == (own.index or 0)


# Of the constructor, by older names; the first is today's for the first argument.
_OLDER_OPTIONS = {
    "model_name_or_path": "path_or_hub_id",
    "model_name": "path_or_hub_id",
    "automodel_args": "model_kwargs",
    "tokenizer_args": "processor_kwargs",
    "tokenizer_kwargs": "processor_kwargs",
    "config_args": "config_kwargs",
    "cache_dir": "cache_folder",
    "default_activation_function": "activation_fn",
}
_ONCE_POSITIONAL = ("num_labels", "max_length", "activation_fn", "device")
_REFUSED_OPTIONS = {
    "modules": "save them as a CrossEncoder of sentence-transformers and open its directory",
    "model_card_data": "set card_metadata before save_pretrained",
}


def with_their_options(init: F) -> F:
    """The constructor, called by the arguments of today's or of older releases of
    sentence-transformers.
    """

    @functools.wraps(init)
    def call(self: Any, *args: Any, **options: Any) -> None:
        if len(args) > 1 + len(_ONCE_POSITIONAL):
            raise TypeError(f"CrossEncoder() takes a model and options by name, got {len(args)}")
        args, rest = args[:1], args[1:]
        given = dict(zip(_ONCE_POSITIONAL, rest, strict=False))
        given |= {name: options.pop(older) for older, name in _older_of(options)}
        if twice := given.keys() & options.keys():
            raise TypeError(
                f"CrossEncoder() got {min(twice)} twice, also by an older name or place"
            )
        options |= given
        for name in ("model_kwargs", "processor_kwargs", "config_kwargs"):
            if not isinstance(value := options.get(name) or {}, Mapping):
                raise ValueError(f"{name}: expected options by name, got {shown(value)}")
        if (dropout := options.pop("classifier_dropout", None)) is not None:
            config = options.get("config_kwargs") or {}
            options["config_kwargs"] = {**config, "classifier_dropout": dropout}
        for name, instead in _REFUSED_OPTIONS.items():
            if options.pop(name, None) is not None:
                raise ValueError(f"expected no {name}: {instead}")
        if (backend := options.pop("backend", "torch")) != "torch":
            raise ValueError(
                f"expected backend='torch', got {backend!r}: rerank-fast export writes a file for "
                "onnxruntime"
            )
        init(self, *args, **options)

    return call  # type: ignore[return-value]


def _older_of(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The older names among options, each with today's; said once."""
    found = [(older, name) for older, name in _OLDER_OPTIONS.items() if older in options]
    for older, name in found:
        if older != "model_name_or_path":
            _say_older("__init__", older, name)
    return found


_MODEL_KWARGS = {"attn_implementation", "low_cpu_mem_usage", "use_safetensors"}


def split_dtype(dtype: Any, model_kwargs: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """The dtype that is asked for in one of two places, None for the weights' own; and what else
    model_kwargs have for from_pretrained.

    Raises:
        ValueError: both places name one, or model_kwargs have what is not served.
    """
    others = dict(model_kwargs or {})
    named = [others.pop(name) for name in ("torch_dtype", "dtype") if name in others]
    named = [one for one in named if one not in (None, "auto")]  # there auto is the weights' own
    if len(named) + (dtype is not None) > 1:
        raise ValueError(f"expected one dtype, got {dtype} and model_kwargs of {named}")
    if unknown := sorted(others.keys() - _MODEL_KWARGS):
        raise ValueError(
            f"model_kwargs: expected dtype or attn_implementation, got {', '.join(unknown)}"
        )
    if not others.pop("use_safetensors", True):
        raise ValueError("model_kwargs: use_safetensors must be True, pickles are not loaded")
    return (named[0] if named else dtype), others


@functools.cache
def _say_older(method: str, older: str, name: str) -> None:
    logger.warning("CrossEncoder.%s: %s is called %s now.", method, older, name)
