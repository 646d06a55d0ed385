"""What a row must be: column names, types and the checks, for Python rows and for Arrow tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("query", "docs", "labels")
_ALIASES = {"query": ("query",), "docs": ("docs",), "labels": ("labels", "label", "scores", "score")}
_FLOAT32_MAX = 3.4028234663852886e38
_Problem = tuple[int, str, str]  # row in the table, column, what is wrong


def arrow_schema() -> pa.Schema:
    """query: string, docs: list of strings, labels: list of float32."""
    import pyarrow as pa

    return pa.schema(
        [("query", pa.string()), ("docs", pa.list_(pa.string())), ("labels", pa.list_(pa.float32()))]
    )


# -- columns ------------------------------------------------------------------------------------------------


def check_mapping(columns: Mapping[str, str] | None) -> Mapping[str, str]:
    """The mapping canonical name -> source name, or an empty one.

    Raises:
        ValueError: a key that is not a canonical name, or a source name that is not a string or used twice.
    """
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        raise ValueError(f"columns: expected a mapping such as {{'docs': 'passages'}}, got {columns!r}")
    for name, source in columns.items():
        if name not in COLUMNS:
            raise ValueError(f"columns: expected keys among {', '.join(COLUMNS)}, got {name!r}")
        if not isinstance(source, str):
            raise ValueError(f"columns: expected a column's name for {name!r}, got {source!r}")
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"columns: expected a different source for each, got {dict(columns)}")
    return columns


def resolve_columns(present: Sequence[str], columns: Mapping[str, str], where: str) -> dict[str, str]:
    """The source's name of each canonical column.

    Raises:
        ValueError: a column is missing (names those there), or several could be the labels.
    """
    names = {}
    listing = ", ".join(map(repr, present)) or "none"
    for name in COLUMNS:
        wanted = (columns[name],) if name in columns else _ALIASES[name]
        found = [alias for alias in wanted if alias in present]
        if not found:
            raise ValueError(f"{where}: no column {' or '.join(map(repr, wanted))} for {name}; the columns are {listing}")
        if len(found) > 1 and found[0] != name:
            raise ValueError(
                f"{where}: {', '.join(map(repr, found))} could each be {name}; choose with "
                f"columns={{{name!r}: {found[0]!r}}}"
            )
        names[name] = found[0]
    return names


# -- Python rows --------------------------------------------------------------------------------------------


def check_row(row: Mapping[str, Any], names: Mapping[str, str], where: str) -> tuple[str, list[str], list[float]]:
    """The query, documents and labels of one row.

    Raises:
        ValueError: the row is malformed; names `where` and the field.
    """
    for name in COLUMNS:
        if names[name] not in row:
            listing = ", ".join(map(repr, row)) or "none"
            raise ValueError(f"{where}: field {names[name]!r} is missing; the fields are {listing}")
    query, docs, labels = (row[names[name]] for name in COLUMNS)
    at_query, at_docs, at_labels = (f"{where}: field {names[name]!r}" for name in COLUMNS)
    _check_text(query, at_query)
    if not query.strip():
        raise ValueError(f"{at_query}: expected a query, got an empty string")
    docs = _check_sequence(docs, at_docs, "strings")
    if not docs:
        raise ValueError(f"{at_docs}: expected at least one document, got none")
    for index, doc in enumerate(docs):
        _check_text(doc, at_docs, index)
    labels = _check_sequence(labels, at_labels, "numbers")
    if len(labels) != len(docs):
        raise ValueError(f"{at_labels}: expected one label for each of {len(docs)} documents, got {len(labels)}")
    return query, docs, [_check_label(label, at_labels, index) for index, label in enumerate(labels)]


def _check_text(value: Any, where: str, index: int | None = None) -> None:
    at = "" if index is None else f" at index {index}"
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a string{at}, got {_show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{where}: expected valid Unicode{at}: {error}") from error


def _check_sequence(value: Any, where: str, of: str) -> list[Any]:
    if hasattr(value, "tolist"):  # numpy arrays, tensors
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: expected a list of {of}, got {_show(value)}")
    return list(value)


def _check_label(value: Any, where: str, index: int) -> float:
    if hasattr(value, "item"):  # numpy scalars
        value = value.item()
    if not isinstance(value, (int, float)):
        raise ValueError(f"{where}: expected a number at index {index}, got {_show(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number at index {index}, got {value}")
    if abs(value) > _FLOAT32_MAX:
        raise ValueError(f"{where}: expected a number within float32's range at index {index}, got {_show(value)}")
    return float(value)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


# -- Arrow tables -------------------------------------------------------------------------------------------


def check_table(table: pa.Table, names: Mapping[str, str], where: str, first_row: int) -> pa.Table:
    """The table with the canonical columns and types.

    Args:
        table: rows `first_row` and on of the source, with its column names.

    Raises:
        ValueError: a column has the wrong type, or a row is malformed; names the first such row and the field.
    """
    import pyarrow as pa

    query, docs, labels = (_one_array(table[names[name]]) for name in COLUMNS)
    problems = _query_problems(query) + _docs_problems(docs) + _labels_problems(labels)
    _raise_first(problems, names, where, first_row)
    docs, labels = _plain_list(docs), _plain_list(labels)
    _raise_first(_length_problems(docs, labels), names, where, first_row)
    schema = arrow_schema()
    values = labels.flatten().cast(pa.float32(), safe=False)
    lists = pa.ListArray.from_arrays(_offsets(labels), values)
    arrays = [query.cast(pa.string()), docs.cast(schema.field("docs").type), lists]
    return pa.Table.from_arrays(arrays, schema=schema)
