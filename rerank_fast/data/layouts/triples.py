"""MS MARCO's training triples: tables of tabs without a header."""

from __future__ import annotations

from collections.abc import Sequence

from rerank_fast.data.layouts.choice import LAYOUTS

# By the number of columns: a query, a positive and a negative, perhaps after a teacher's scores.
_COLUMNS = {
    3: ("query", "positive", "negative"),
    5: ("positive_score", "negative_score", "query", "positive", "negative"),
}


def headerless(cells: Sequence[str]) -> Sequence[str] | None:
    """The columns of a .tsv file by its first line, None where that is a header.

    What names the columns of a layout is a header, and so are words without a blank between them.
    Triples of whole numbers are ids.
    """
    names = _COLUMNS.get(len(cells))
    if names is None or any(layout.matches(cells) for layout in LAYOUTS):
        return None
    if len(cells) == 5 and not all(map(_is_number, cells[:2])):
        return None
    if all(cell.strip().isdigit() for cell in cells[-3:]):
        return (*names[:-3], "query_id", "positive_id", "negative_id")
    return names if any(" " in cell.strip() for cell in cells[-2:]) else None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
