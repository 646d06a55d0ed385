"""Lists of any source: of its rows by their layout, or of its parts by what there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

from rerank_fast.data.layouts import id_tables, judgements
from rerank_fast.data.layouts.choice import LAYOUTS, Described, check_choice, read_layouts, said
from rerank_fast.data.layouts.parts import find_parts
from rerank_fast.data.layouts.row import Options
from rerank_fast.data.layouts.triples import headerless
from rerank_fast.data.rows import Source, name_of, paths_in, read_items

# All layouts with an example of each, as an error shows them.
_ALL: tuple[Described, ...] = (*LAYOUTS, id_tables, judgements)
KNOWN = "; ".join(f"{layout.NAME} {layout.EXAMPLE}" for layout in _ALL)


def read_lists(
    source: Source,
    options: Options,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    say: Callable[..., None],
) -> Iterator[dict[str, Any]]:
    """Checked lists, read as they are asked for; see load_lists.

    Args:
        say: logs which layout was taken, in a line for files that are alike.
    """
    paths = paths_in(source)
    found = [(one, find_parts(one, split)) for one in ([source] if paths is None else paths)]

    def of_rows(items: Any) -> Iterator[dict[str, Any]]:
        return read_layouts(items, options, columns=columns, known=KNOWN, say=say)

    for together, group in groupby(found, key=lambda one: one[1] is None):
        if together:
            rest = [one for one, _ in group]
            yield from of_rows(read_items(source if paths is None else rest, split, headerless))
            continue
        for one, parts in group:
            assert parts is not None
            if id_tables.matches(list(parts)):
                yield from of_rows(id_tables.resolved(parts))
            else:
                yield from _judged(name_of(one), parts, options, say)


def _judged(
    name: str, parts: Mapping[str, Source], options: Options, say: Callable[..., None]
) -> Iterator[dict[str, Any]]:
    columns = list(parts)
    if not judgements.matches(columns):
        there = ", ".join(columns)
        raise ValueError(f"{name}: no layout has the parts {there} alone; known are {KNOWN}")
    check_choice(judgements, columns, options, name)
    say("%s: %s", name, said(judgements, columns, options))
    return judgements.rows(parts, options)
