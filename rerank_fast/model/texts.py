"""Texts and numbers as they are handed in, Python's, NumPy's or PyTorch's, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

Pair: TypeAlias = Sequence[str]  # (query, document)
_FLOAT32_MAX = 3.4028234663852886e38


def plain(value: Any) -> Any:
    """NumPy's and PyTorch's numbers, strings and arrays as Python's own, tables as rows; anything
    else as it is.
    """
    if hasattr(value, "columns") and hasattr(value, "to_numpy"):  # a DataFrame
        names = list(value.columns)
        return (
            (value[["query", "document"]] if {"query", "document"} <= {*names} else value)
            .to_numpy()
            .tolist()
        )
    return value.tolist() if hasattr(value, "tolist") else value


def shown(value: Any) -> str:
    """What came, for an error: its type and the beginning of its value."""
    return f"{type(value).__name__} {value!r:.60}"


def one_line(error: BaseException) -> str:
    """What an error says, in one line, without its kind where its words are enough."""
    said = " ".join(str(error).split())[:300]
    if type(error) in (OSError, ValueError, RuntimeError, Exception) and said:
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _is_text(value: Any) -> bool:
    """Whether a value is Python's own string and valid Unicode."""
    if type(value) is not str:
        return False
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def check_text(value: Any, place: str, *, allow_empty: bool = True) -> str:
    """A text as Python's own string.

    Raises:
        ValueError: it is no string, or not valid Unicode, or empty where that is not allowed;
            begins with the place.
    """
    text = plain(value)
    if not isinstance(text, str):
        raise ValueError(f"{place}: expected a string, got {shown(value)}")
    if not allow_empty and not text.strip():
        raise ValueError(f"{place}: the string is empty")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise ValueError(f"{place}: not valid Unicode: {error}") from error
    return text if type(text) is str else str(text)


def check_pairs(pairs: Any) -> list[Pair]:
    """Pairs of Python's strings, of any iterable of two strings each.

    Raises:
        ValueError: an element is not a pair of strings, or not valid Unicode; names its index.
    """
    pairs = plain(pairs)
    if isinstance(pairs, str | bytes | Mapping) or not isinstance(pairs, Iterable):
        raise ValueError(f"expected pairs (query, document), got {shown(pairs)}")
    return [_check_pair(pair, index) for index, pair in enumerate(pairs)]


def _check_pair(pair: Any, index: int) -> Pair:
    if type(pair) in (tuple, list) and len(pair) == 2 and _is_text(pair[0]) and _is_text(pair[1]):
        return pair  # nearly always: words for an error cost more than the check
    pair = plain(pair)
    no_pair = isinstance(pair, str | bytes | Mapping) or not hasattr(pair, "__getitem__")
    if no_pair or len(pair) != 2:
        raise ValueError(f"pair {index}: expected (query, document), got {shown(pair)}")
    query, document = pair
    return check_text(query, f"pair {index}, query"), check_text(
        document, f"pair {index}, document"
    )


def check_documents_of(documents: Any, place: str) -> list[Any]:
    """One query's documents as a list, not looked at.

    Raises:
        ValueError: they are a string, a mapping or nothing that can be iterated; begins with the
            place.
    """
    documents = plain(documents) if isinstance(documents, np.ndarray) else documents
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
        raise ValueError(f"{place}: expected a list of documents, got {shown(documents)}")
    return list(documents)


def check_inputs(
    queries: Iterable[Any], documents: Iterable[Any]
) -> tuple[list[Any], list[list[Any]]]:
    """Queries, and each one's documents, as lists; texts are checked.

    What a model may read beside texts, as images and audio, passes as it is.

    Raises:
        ValueError: a number, bytes or None stands in place of a text, a text is not valid Unicode,
            or a query's documents are no list; names the query and the document.
    """
    lists = [check_documents_of(docs, f"query {q}") for q, docs in enumerate(documents)]
    return (
        [check_input(query, f"query {q}") for q, query in enumerate(queries)],
        [
            [check_input(document, f"query {q}, document {d}") for d, document in enumerate(docs)]
            for q, docs in enumerate(lists)
        ],
    )


def check_input(value: Any, place: str) -> Any:
    """What a model reads: a text, checked, or, as it is, an image, audio or another that it may
    take beside texts.

    Raises:
        ValueError: a number, bytes or None stands in place of a text, or it is not valid Unicode;
            begins with the place.
    """
    scalar = isinstance(value, np.generic | np.ndarray) and value.ndim == 0
    if scalar or value is None or isinstance(value, str | bytes | bool | int | float | complex):
        return check_text(value, place)
    return value


def real(value: Any) -> float | None:
    """Any real number as a float, Python's, NumPy's or a tensor's; of anything else None."""
    if type(value) is float:  # nearly always
        return value
    number = value if type(value) is int else plain(value)
    if not isinstance(number, Real | Decimal):
        return None
    try:
        return float(number)
    except OverflowError:
        return math.inf
    except ValueError:  # a signalling NaN
        return math.nan


def check_finite(value: Any, place: str) -> float:
    """A number that float32 can hold.

    Raises:
        ValueError: it is no number, NaN or too large; begins with the place.
    """
    number = real(value)
    if number is None or not abs(number) <= _FLOAT32_MAX:
        raise ValueError(f"{place}: expected a finite float32, got {plain(value)!r:.40}")
    return number


def check_labels(labels: Any, place: str) -> list[float]:
    """One query's labels as Python's numbers.

    Raises:
        ValueError: they are no list of numbers; begins with the place.
    """
    values = plain(labels)
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{place}: expected a label for each document, got {shown(labels)}")
    numbers = []
    for i, value in enumerate(values):
        number = real(value)
        if number is None:
            raise ValueError(f"{place}[{i}]: expected a number, got {shown(plain(value))}")
        numbers.append(number)
    return numbers
