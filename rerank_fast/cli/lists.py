"""The lists a command reads, under the names of their own columns."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser


def add_columns(parser: ArgumentParser) -> None:
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
