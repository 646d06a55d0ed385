"""Whole runs by name: YAML files beside this one, read with overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

import yaml

from rerank_fast.training.config import TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """Where a run's model, lists and evaluation come from, and its training settings."""

    model: str
    ms_marco: str | None
    lists: list[str]
    labels: Literal["relevance", "scores"]
    held_out: int
    nano_beir: list[str]
    nano_beir_id: str
    rerank_k: int
    training: TrainingConfig


def recipe_names() -> list[str]:
    return sorted(
        file.name.removesuffix(".yaml")
        for file in files(__name__).iterdir()
        if file.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """The YAML of a recipe, comments included.

    Raises:
        ValueError: no such recipe; lists those that there are.
    """
    if name not in recipe_names():
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(recipe_names())}")
    return files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe with "key=value" overrides; a value is read as YAML.

    Raises:
        ValueError: the recipe or a key is unknown (lists those that there are), or a value can't be
            used.
    """
    settings: dict[str, Any] = yaml.safe_load(recipe_text(name))
    of_training = {field.name: field.type for field in fields(TrainingConfig)}
    sources = [field.name for field in fields(Recipe) if field.name != "training"]
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.replace("-", "_")
        if not equals:
            raise ValueError(f"--set takes key=value, got {override!r}")
        if key not in of_training and key not in sources:
            raise ValueError(
                f"unknown key {key!r} in --set; there are {', '.join([*sources, *of_training])}"
            )
        try:
            value = yaml.safe_load(text)
            # YAML 1.1 reads 2e-5, without a point, as text.
            settings[key] = (
                float(text) if of_training.get(key) == "float" and isinstance(value, str) else value
            )
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"--set {override}: not a value: {error}") from error
    chosen = {key: value for key, value in settings.items() if key in of_training}
    _check_kinds(chosen)
    training = TrainingConfig(**chosen)
    for key in ("lists", "nano_beir"):
        settings[key] = [settings[key]] if isinstance(settings[key], str) else settings[key] or []
    recipe = Recipe(**{key: settings[key] for key in sources}, training=training)
    _check(recipe, name)
    return recipe


def _check_kinds(settings: Mapping[str, Any]) -> None:
    """Of settings that may be text or nothing; numbers TrainingConfig checks itself."""
    for key, kind in get_type_hints(TrainingConfig).items():
        kinds = get_args(kind) or (kind,)
        plain = all(one in (str, int, float, NoneType) for one in kinds)
        if key not in settings or not plain or kinds in ((int,), (float,)):
            continue
        if type(settings[key]) not in kinds:
            names = " or ".join(
                {str: "text", NoneType: "null"}.get(one, one.__name__) for one in kinds
            )
            raise ValueError(f"{key} must be {names}, got {settings[key]!r}")


def _check(recipe: Recipe, name: str) -> None:
    for key in ("model", "nano_beir_id"):
        if not isinstance(getattr(recipe, key), str):
            raise ValueError(f"{key} must be a path or hub id, got {getattr(recipe, key)!r}")
    for key in ("lists", "nano_beir"):
        value = getattr(recipe, key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{key} must be a string or a list of strings, got {value!r}")
    for key, least in (("held_out", 0), ("rerank_k", 1)):
        value = getattr(recipe, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{key} must be an int of at least {least}, got {value!r}")
    if recipe.labels not in ("relevance", "scores"):
        raise ValueError(f"labels must be relevance or scores, got {recipe.labels!r}")
    if recipe.ms_marco is not None and not isinstance(recipe.ms_marco, str):
        raise ValueError(f"ms_marco must be null, a path or a hub id, got {recipe.ms_marco!r}")
    if recipe.ms_marco is None and not recipe.lists:
        raise ValueError(f"recipe {name} needs lists to train on: --set lists=PATH")
