"""FlagEmbedding's rows: positives and negatives as lists, perhaps with a teacher's scores.

An instruction in `prompt` stays out, as FlagEmbedding's encoders leave it: a model here has its own
(`CrossEncoder(..., prompt=...)`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rerank_fast.data.layouts.row import QUERY, Options, Row, ranked, relevance

NAME = "FlagEmbedding"
EXAMPLE = '{"query": "...", "pos": ["..."], "neg": ["..."], "pos_scores": [9], "neg_scores": [-1]}'


def matches(columns: Sequence[str]) -> bool:
    return {"pos", "neg"} <= set(columns) and not set(columns).isdisjoint(QUERY)


def labels(columns: Sequence[str]) -> dict[str, str]:
    found = {"relevance": "1 for pos, 0 for neg"}
    if {"pos_scores", "neg_scores"} <= set(columns):
        found["scores"] = "pos_scores and neg_scores"
    return found


def rows(source: Iterable[Row], options: Options) -> Iterator[dict[str, Any]]:
    for row in source:
        query = row.query()
        positive, negative = row.texts("pos"), row.texts("neg")
        values = relevance(len(positive), len(positive) + len(negative))
        if options.labels == "scores":
            values = _scores(row, "pos", positive) + _scores(row, "neg", negative)
        yield ranked(row, query, positive + negative, values, ("pos", "pos_scores"))


def _scores(row: Row, name: str, texts: Sequence[str]) -> list[float]:
    values = row.numbers(f"{name}_scores")
    if len(values) != len(texts):
        where = row.where(f"{name}_scores")
        raise ValueError(f"{where}: {len(values)} scores, but {len(texts)} texts in {name}")
    return values
