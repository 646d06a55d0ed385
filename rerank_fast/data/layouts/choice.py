"""Which layout rows are of, by their columns; the first that fits is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

from rerank_fast.data.layouts import (
    by_order,
    flag_embedding,
    lists,
    pairs,
    tevatron,
    triplets,
)
from rerank_fast.data.layouts.row import Options, Row
from rerank_fast.data.rows import Placed
from rerank_fast.model.texts import shown

logger = logging.getLogger(__name__)


class Described(Protocol):
    """What errors say of a layout: its name and a row, or parts, as JSON."""

    NAME: str
    EXAMPLE: str


class Labelled(Described, Protocol):
    """What the log says beside that."""

    def labels(self, columns: Sequence[str]) -> Mapping[str, str]:
        """What "relevance" and, if there are any, "scores" are, in words."""


class Layout(Labelled, Protocol):
    """How rows become {"query", "docs", "labels"}; a module with these names."""

    def matches(self, columns: Sequence[str]) -> bool:
        """Whether rows with these columns, in their order, are of this layout."""

    def rows(self, source: Iterable[Row], options: Options) -> Iterator[dict[str, Any]]:
        """Lists of checked rows.

        Raises:
            ValueError: a row is malformed; names its place and the field.
        """


LAYOUTS: tuple[Layout, ...] = (lists, flag_embedding, tevatron, triplets, pairs, by_order)
# What `columns` may give a source's column for.
FIELDS = ("query", "docs", "labels", "scores", "document", "label", "score", "positive", "negative")


def read_layouts(
    items: Iterable[tuple[str, Iterable[Placed]]],
    options: Options,
    *,
    columns: Mapping[str, str] | None = None,
    known: str,
    say: Callable[..., None] = logger.debug,
) -> Iterator[dict[str, Any]]:
    """Lists of the rows of several files; each file is of one layout, by its first row.

    Files of one layout that follow each other are read as one.

    Args:
        items: each file's name and rows.
        options: what is read of them.
        columns: where a source's columns have other names.
        known: all layouts, as an error lists them.
        say: logs which layout was taken.

    Raises:
        ValueError: no layout fits, or a row is malformed or of another layout than its file.
    """
    for name in columns or {}:
        if name not in FIELDS:
            fields = ", ".join(FIELDS)
            raise ValueError(f"columns maps {fields} to the source's names, got the key {name!r}")
    tagged = _tagged(items, options, columns or {}, known, say)
    for layout, group in groupby(tagged, key=itemgetter(0)):
        yield from layout.rows((row for _, row in group), options)


def _tagged(
    items: Iterable[tuple[str, Iterable[Placed]]],
    options: Options,
    columns: Mapping[str, str],
    known: str,
    say: Callable[..., None],
) -> Iterator[tuple[Layout, Row]]:
    told = ""
    for name, rows in items:
        layout: Layout | None = None
        first: Mapping[str, str] = {}
        there: Sequence[str] = ()
        for place, values in rows:
            row = _row(place, values, columns)
            if layout is None or row.values.keys() != set(there):
                there = list(row.values)
                if layout is None:
                    layout = layout_of(there, place, known)
                    check_choice(layout, there, options, place)
                    taken = said(layout, there, options)
                    if taken != told:
                        say("%s: %s", name, taken)
                    told = taken
                    first = layout.labels(there)
                elif not layout.matches(there) or _takes_scores(layout.labels(there), first):
                    raise ValueError(
                        f"{place}: not of the layout {layout.NAME}, which the rows before it are "
                        f"of, as in {layout.EXAMPLE}; there are {_sorted(there)}"
                    )
                else:
                    check_choice(layout, there, options, place)
            yield layout, row


def _takes_scores(choices: Mapping[str, str], first: Mapping[str, str]) -> bool:
    """Whether a row lacks the labels of the first, so that its scores would be taken for them."""
    return choices["relevance"] == first.get("scores") != first["relevance"]


def layout_of(columns: Sequence[str], place: str, known: str) -> Layout:
    """The first layout that fits these columns.

    Raises:
        ValueError: none does; shows them all.
    """
    found = next((layout for layout in LAYOUTS if layout.matches(columns)), None)
    if found is None:
        there = _sorted(columns)
        raise ValueError(f"{place}: no layout has the columns {there}; known are {known}")
    return found


def _sorted(columns: Sequence[str]) -> str:
    return ", ".join(sorted(map(str, columns))) or "none"


def _row(place: str, values: Any, columns: Mapping[str, str]) -> Row:
    if not isinstance(values, Mapping):
        expected = "an object with a query and its documents"
        raise ValueError(f"{place}: expected {expected}, got {shown(values)}")
    if not columns:
        return Row(place, values)
    for field, column in columns.items():
        if column not in values:
            there = sorted(map(str, values))
            raise ValueError(f"{place}: no column {column} for the {field}; there are {there}")
    fields = {column: field for field, column in columns.items()}
    renamed: dict[Any, Any] = {}
    for name, value in values.items():
        if name in fields or name not in columns:  # the last: a column that another stands for
            renamed[fields.get(name, name)] = value
    return Row(place, renamed, columns)


def said(layout: Labelled, columns: Sequence[str], options: Options) -> str:
    """What was taken for what, in a line."""
    choices = layout.labels(columns)
    taken = choices[options.labels]
    others = [choice for choice in choices if choices[choice] != taken]
    return f"read as {layout.NAME} ({', '.join(columns)}); labels: {taken}" + "".join(
        f"; labels={choice!r} takes {choices[choice]}" for choice in others
    )


def check_choice(layout: Labelled, columns: Sequence[str], options: Options, place: str) -> None:
    """Whether what is to become the labels is there."""
    if options.labels not in layout.labels(columns):
        raise ValueError(
            f"{place}: labels is {options.labels!r}, but there are no scores in this row of the "
            f"layout {layout.NAME}: {', '.join(columns)}"
        )
