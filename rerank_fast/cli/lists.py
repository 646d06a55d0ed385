"""The lists a command reads, under the names of their own columns; options that need another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

from rerank_fast.cli.parser import CommandParser

# A path, a glob or a hub id; several; or parts, as {corpus: ..., queries: ..., qrels: ...}.
Source: TypeAlias = dict[str, Any] | list[str] | str
LISTS = "lists: file, glob, folder, hub id NAME:CONFIG[SPLIT], [several] or {parts: ...}"


def add_columns(parser: CommandParser) -> None:
    parser.add_argument(
        "--columns",
        type=dict[str, str] | None,
        default=None,
        help="""the lists' own names of query, docs, labels ..., e.g. '{"docs": "passages"}'""",
    )


def lists_of(
    source: Source,
    columns: dict[str, str] | None,
    labels: Literal["relevance", "scores"] = "relevance",
) -> Any:
    """The source as it is, or read here where it is not read as a Trainer would."""
    if columns is None and labels == "relevance":
        return source
    from rerank_fast.data.lists import load_lists

    return load_lists(source, columns=columns, labels=labels)


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
