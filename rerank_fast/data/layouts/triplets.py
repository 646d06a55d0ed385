"""A query with a positive and its negatives, each in a column of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rerank_fast.data.layouts.row import LABELS, QUERY, Options, Row, ranked, relevance

NAME = "triplets"
EXAMPLE = '{"query": "...", "positive": "...", "negative_1": "...", "negative_2": "..."}'

_POSITIVE = ("positive", "positives")
_NEGATIVE = re.compile(r"negatives?|negative_(\d+)")


def matches(columns: Sequence[str]) -> bool:
    there = set(columns)
    if there.isdisjoint(QUERY) or there.isdisjoint(_POSITIVE):
        return False
    # With a label and without a negative, sentence-transformers' columns go by order.
    return bool(_negatives(columns)) or there.isdisjoint(LABELS)


def labels(columns: Sequence[str]) -> dict[str, str]:
    found = {"relevance": "1 for the positive, 0 for negatives"}
    texts = [*(name for name in _POSITIVE if name in columns), *_negatives(columns)]
    own = [_own_scores(name, columns) for name in texts]
    joint = next((name for name in LABELS if name in columns), None)
    if joint is not None:
        found["scores"] = joint
    elif all(own):
        found["scores"] = ", ".join(filter(None, own))
    return found


def rows(source: Iterable[Row], options: Options) -> Iterator[dict[str, Any]]:
    for row in source:
        query, positive = row.query(), row.first(_POSITIVE)
        texts = {positive: row.texts(positive, or_one=True)}
        for name in _negatives(list(row.values)):
            # Of numbered negatives a row may have fewer than others.
            if row.given(name) or name in ("negative", "negatives"):
                texts[name] = row.texts(name, or_one=True)
        docs = [text for column in texts.values() for text in column]
        if options.labels == "scores":
            yield ranked(row, query, docs, *_scores(row, texts, positive))
        else:
            values = relevance(len(texts[positive]), len(docs))
            yield ranked(row, query, docs, values, (positive, positive))


def _scores(
    row: Row,
    texts: Mapping[str, Sequence[str]],
    positive: str,
) -> tuple[list[float], tuple[str, str]]:
    """Scores of all documents, and the fields of both.

    One column may hold them all, or the margins between the positive and each negative, as
    sentence-transformers' MarginMSE takes them: the positive's score is 0 then, which leaves every
    difference as it is.
    """
    joint = next((name for name in LABELS if name in row.values), None)
    if joint is not None:
        values = row.numbers(joint, or_one=True)
        if len(texts[positive]) == 1 and len(values) == sum(map(len, texts.values())) - 1:
            values = [0.0, *(-margin for margin in values)]
        return values, (positive, joint)
    values, last = [], positive
    for name in texts:
        own = _own_scores(name, list(row.values))
        if own is None:
            raise ValueError(f"{row.where(name)}: no column {name}_score for its scores")
        found, last = row.numbers(own, or_one=True), own
        if len(found) != len(texts[name]):
            sizes = f"{len(found)} scores for {len(texts[name])} documents"
            raise ValueError(f"{row.where(own)}: {sizes}")
        values += found
    return values, (positive, last)


def _negatives(columns: Sequence[str]) -> list[str]:
    """Columns of negatives: the one without a number, then by number."""
    found = [match for name in columns if (match := _NEGATIVE.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: int(match[1] or 0))]


def _own_scores(name: str, columns: Sequence[str]) -> str | None:
    """The column of the scores of one column's texts: negative_1_score or negative_score_1."""
    numbered = re.sub(r"_(\d+)$", r"_score_\1", name)
    candidates = (f"{name}_score", f"{name}_scores", numbered)
    return next((one for one in candidates if one in columns and one != name), None)
