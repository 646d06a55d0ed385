"""One row of a source under the names of its fields, each read as what the layout says it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rerank_fast.data.delimited import Cell
from rerank_fast.model.texts import check_finite, check_text, plain, shown

QUERY = ("query", "anchor", "question")
RELEVANCE = ("labels", "label")
SCORES = ("scores", "score")
# sentence-transformers takes any of these as the label column.
LABELS = (*RELEVANCE, *SCORES)


@dataclass(frozen=True)
class Options:
    """What is read of rows.

    labels: what becomes the labels where rows have both: "relevance", or a teacher's "scores".
    consecutive: rows of a query that do not stand together are several lists; nothing is held back.
    """

    labels: Literal["relevance", "scores"] = "relevance"
    consecutive: bool = False

    def __post_init__(self) -> None:
        if self.labels not in ("relevance", "scores"):
            raise ValueError(f"labels must be relevance or scores, got {self.labels!r}")


@dataclass(frozen=True)
class Row:
    """Values by field, their place, and the source's own names of what it calls otherwise."""

    place: str
    values: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)

    def where(self, name: str) -> str:
        return f"{self.place}, field {self.names.get(name, name)}"

    def first(self, names: Iterable[str]) -> str:
        """The first of these fields that there is."""
        found = next((name for name in names if name in self.values), None)
        assert found is not None  # the layout matched
        return found

    def given(self, name: str) -> bool:
        """Whether there is something in a field: a table has None where a row has none."""
        value = plain(self.values.get(name))
        return value is not None and value != ""

    def query(self) -> str:
        name = self.first(QUERY)
        return check_text(self.values[name], self.where(name), allow_empty=False)

    def text(self, name: str) -> str:
        return check_text(self.values[name], self.where(name))

    def texts(self, name: str, *, or_one: bool = False) -> list[str]:
        """A list of strings, or one string where that is allowed."""
        value = plain(self.values[name])
        if or_one and isinstance(value, str):
            return [check_text(value, self.where(name))]
        return self._all(name, check_text)

    def number(self, name: str) -> float:
        return number_of(self.values[name], self.where(name))

    def numbers(self, name: str, *, or_one: bool = False) -> list[float]:
        """A list of numbers, or one number where that is allowed."""
        value = plain(self.values[name])
        if or_one and not isinstance(value, list | tuple) and not _looks_listed(value):
            return [number_of(value, self.where(name))]
        return self._all(name, number_of)

    def is_listed(self, name: str) -> bool:
        value = plain(self.values[name])
        return isinstance(value, list | tuple) or _looks_listed(value)

    def labels_field(self, options: Options) -> str:
        return self.first(SCORES if options.labels == "scores" else LABELS)

    def listed(self, name: str) -> Sequence[Any]:
        """A list of whatever."""
        value, expected = plain(self.values[name]), "a list"
        if isinstance(value, Cell):
            expected = "a list as JSON writes it"
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = str(value)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{self.where(name)}: expected {expected}, got {shown(value)}")
        return value

    def _all(self, name: str, check: Callable[[Any, str], Any]) -> list[Any]:
        where = self.where(name)
        return [check(value, f"{where}[{i}]") for i, value in enumerate(self.listed(name))]


def _looks_listed(value: Any) -> bool:
    return isinstance(value, Cell) and value.lstrip().startswith("[")


def number_of(value: Any, place: str) -> float:
    """A number, or one that a table of text writes out; see check_finite."""
    if isinstance(value, Cell):
        try:
            value = float(value)
        except ValueError:
            value = str(value)
    return check_finite(value, place)


def check_sizes(
    row: Row,
    docs: Sequence[str],
    labels: Sequence[float],
    fields: tuple[str, str],
) -> None:
    """Of documents and labels that came of the fields of these names.

    Raises:
        ValueError: there is no document, or not a label for each.
    """
    of_docs, of_labels = (row.names.get(name, name) for name in fields)
    if not docs:
        raise ValueError(f"{row.place}, field {of_docs}: no documents")
    if len(docs) != len(labels):
        sizes = f"{len(docs)} documents in {of_docs} but {len(labels)} labels in {of_labels}"
        raise ValueError(f"{row.place}: {sizes}")


def ranked(
    row: Row,
    query: str,
    docs: list[str],
    labels: list[float],
    fields: tuple[str, str],
) -> dict[str, Any]:
    """A list, once its sizes agree; see check_sizes."""
    check_sizes(row, docs, labels, fields)
    return {"query": query, "docs": docs, "labels": labels}


def relevance(positives: int, documents: int) -> list[float]:
    """Labels of documents of which the first so many are relevant."""
    return [1.0] * positives + [0.0] * (documents - positives)
