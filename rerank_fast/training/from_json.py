"""What a JSON file holds as a dataclass, every field checked by its type hint."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


def from_json(kind: Any, value: Any, where: str) -> Any:
    """A value that JSON gave as what a type hint says.

    Args:
        kind: int, float, bool, str, list[...], dict[str, ...], a dataclass of such hints, one of
            them or None, or Any.
        value: to be read.
        where: goes before the field in errors.

    Raises:
        ValueError: a field is missing, unknown or of another type, or a number is not finite.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        given = from_json(dict[str, Any], value, where)
        names = [field.name for field in fields(kind)]
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"{where}: field {', '.join(missing)} is missing")
        if unknown := [name for name in given if name not in names]:
            raise ValueError(
                f"{where}: unknown field {', '.join(unknown)}; expected {', '.join(names)}"
            )
        return kind(
            **{
                name: from_json(hints[name], given[name], f"{where}, field {name}")
                for name in names
            }
        )
    if kind is Any:
        return value
    if isinstance(kind, types.UnionType):
        inner, _ = get_args(kind)  # the other one is None
        return None if value is None else from_json(inner, value, where)
    if get_origin(kind) is list and isinstance(value, list):
        (inner,) = get_args(kind)
        return [from_json(inner, one, f"{where}[{n}]") for n, one in enumerate(value)]
    if get_origin(kind) is dict and isinstance(value, Mapping):
        _, inner = get_args(kind)
        return {name: from_json(inner, one, f"{where}, {name}") for name, one in value.items()}
    if kind in (bool, str) and isinstance(value, kind):
        return value
    number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if kind in (int, float) and number and math.isfinite(value):
        return kind(value)
    name = str(kind).split("[")[0] if get_origin(kind) else kind.__name__
    finite = "finite " if kind in (int, float) else ""
    raise ValueError(f"{where}: expected {finite}{name}, got {type(value).__name__} {value!r:.60}")
