"""Judged documents of queries, others from a run or BM25: BEIR's folders, TREC's files.

Qrels, runs, queries and corpus are in memory; lists are made one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rerank_fast.data.layouts.judged import Judged, read_judged
from rerank_fast.data.layouts.row import Options
from rerank_fast.data.layouts.texts import read_texts
from rerank_fast.data.rows import Source
from rerank_fast.model.texts import check_text

logger = logging.getLogger(__name__)

NAME = "judgements"
EXAMPLE = '{"corpus": "c.jsonl", "queries": "q.jsonl", "qrels": "qrels.tsv", "run": "run.trec"}'

# Documents that BM25 finds for a query, as evaluations rerank them.
BM25_DEPTH = 100
_BLOCK = 256  # queries searched together


def matches(parts: Sequence[str]) -> bool:
    there = set(parts)
    return {"corpus", "queries"} <= there and not there.isdisjoint(("qrels", "run"))


def labels(parts: Sequence[str]) -> dict[str, str]:
    scores = {"scores": "the run's scores"} if "run" in parts else {}
    if "qrels" not in parts:
        return {"relevance": "the run's scores"} | scores
    return {"relevance": "the qrels' grades, 0 where there is none"} | scores


def rows(parts: Mapping[str, Source], options: Options) -> Iterator[dict[str, Any]]:
    """A list for each judged query that has a relevant document: what the run or, without one, BM25
    found, in that order, then judged documents that it missed.

    Where the run's scores are the labels: what the run found, of each of its queries.
    """
    run = read_judged(parts["run"], default=None) if "run" in parts else None
    queries, corpus = (read_texts(parts[name]) for name in ("queries", "corpus"))
    graded: Iterator[tuple[str, dict[str, float]]]
    if run is not None and (options.labels == "scores" or "qrels" not in parts):
        graded = ((query, _scores(query, found)) for query, found in run.items())
    else:
        judged = _relevant(read_judged(parts["qrels"], default=1.0))
        graded = _graded(judged, run, queries, corpus)
    for query, grades in graded:
        yield _list(query, grades, queries, corpus)


def judged_lists(parts: Mapping[str, Source]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The corpus, and a list of each judged query's judged documents."""
    queries, corpus = (read_texts(parts[name]) for name in ("queries", "corpus"))
    judged = read_judged(parts["qrels"], default=1.0)
    lists = [_list(query, _graded_docs(docs), queries, corpus) for query, docs in judged.items()]
    return corpus, lists


def _list(
    query: str, grades: Mapping[str, float], queries: Mapping[str, str], corpus: Mapping[str, str]
) -> dict[str, Any]:
    place = f"query {query!r}"
    _check_there([query], queries, "queries", place)
    _check_there(grades, corpus, "the corpus", place)
    return {
        "query": check_text(queries[query], place, allow_empty=False),
        "docs": [corpus[key] for key in grades],
        "labels": list(grades.values()),
    }


def _relevant(judged: Judged) -> Judged:
    found = {
        query: docs
        for query, docs in judged.items()
        if any(grade is not None and grade > 0 for grade in docs.values())
    }
    if left_out := len(judged) - len(found):
        said = "%d of %d judged queries have no relevant document: left out"
        logger.info(said, left_out, len(judged))
    return found


def _graded(
    judged: Judged, run: Judged | None, queries: Mapping[str, str], corpus: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, float]]]:
    found: Iterator[Iterable[str]]
    if run is not None:
        found = (run.get(query, {}) for query in judged)
    else:
        _check_there(judged, queries, "queries", "qrels")
        found = _bm25(corpus, [queries[query] for query in judged])
    for (query, docs), ids in zip(judged.items(), found, strict=True):
        yield query, _graded_docs(docs, ids)


def _graded_docs(docs: Mapping[str, float | None], found: Iterable[str] = ()) -> dict[str, float]:
    return {key: docs.get(key) or 0.0 for key in [*found, *docs]}


def _bm25(corpus: Mapping[str, str], queries: Sequence[str]) -> Iterator[Sequence[str]]:
    from rerank_fast.data.mining.bm25 import BM25Retriever

    said = "no run: BM25 finds up to %d documents for each of %d queries"
    logger.info(said, BM25_DEPTH, len(queries))
    ids, retriever = list(corpus), BM25Retriever()
    retriever.index(list(corpus.values()), queries, show_progress_bar=False)
    for start in range(0, len(queries), _BLOCK):
        stop = min(start + _BLOCK, len(queries))
        best = retriever.search(start, stop, min(BM25_DEPTH, len(ids)), [()] * (stop - start))
        for indices in best.indices:
            yield [ids[i] for i in indices if i >= 0]


def _scores(query: str, found: Mapping[str, float | None]) -> dict[str, float]:
    scores = {key: score for key, score in found.items() if score is not None}
    if len(scores) < len(found):
        why = "the run has ranks and no scores, which would be the labels"
        raise ValueError(f"query {query!r}: {why}")
    return scores


def _check_there(ids: Iterable[str], texts: Mapping[str, str], what: str, place: str) -> None:
    missing = next((key for key in ids if key not in texts), None)
    if missing is not None:
        raise ValueError(f"{place}: {what} has no {missing!r}")
