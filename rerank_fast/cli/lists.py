"""The lists a command reads, under the names of their own columns; options that need another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rerank_fast.cli.parser import CommandParser


def add_columns(parser: CommandParser) -> None:
    parser.add_argument(
        "--columns",
        type=dict[str, str] | None,
        default=None,
        help="""the lists' own names of query, docs and labels, e.g. '{"docs": "passages"}'""",
    )


def lists_of(source: str, columns: dict[str, str] | None) -> Any:
    """The source as it is, or read here where its columns have other names."""
    if columns is None:
        return source
    from rerank_fast.data.lists import load_lists

    return load_lists(source, columns=columns)


def refuse(
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    names: Iterable[str],
    why: str,
) -> None:
    """Raises ValueError for a setting that is not at its default and would decide nothing."""
    for name in names:
        if settings[name] != defaults[name]:
            raise ValueError(f"{name} {settings[name]} would not be applied: {why}")
