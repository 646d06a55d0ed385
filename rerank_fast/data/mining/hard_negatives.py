"""mine_hard_negatives: documents that look relevant to a query and are not, as ranking lists."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from rerank_fast.data.mining.bm25 import BM25Retriever
from rerank_fast.data.mining.dense import DenseRetriever
from rerank_fast.data.mining.retrieval import Retriever, model_fingerprint, text_fingerprint
from rerank_fast.data.mining.selection import Selection, grade
from rerank_fast.data.mining.sources import Collection, load_collection
from rerank_fast.data.mining.writing import ListWriter, check_output
from rerank_fast.data.output_lock import locked

logger = logging.getLogger(__name__)

_GROUP = 64  # queries rescored and written together: no more is lost by an interruption


@dataclass
class MiningResult:
    """What a mining run wrote and what it left out. The counts below lists are this run's own."""

    output: str
    lists: int = 0  # in the file, those of an interrupted run before included
    resumed_lists: int = 0  # written by earlier runs
    documents: int = 0  # distinct ones of the corpus
    duplicate_documents: int = 0
    queries: int = 0  # with a positive
    queries_without_positive: int = 0
    queries_without_negative: int = 0  # no candidate passed: no list
    lists_with_fewer_negatives: int = 0  # than num_negatives
    positives: int = 0
    negatives: int = 0
    skipped_candidates: dict[str, int] = field(default_factory=dict)  # by the option that did it


def mine_hard_negatives(
    queries: Any,
    corpus: Any = None,
    *,
    output: str | os.PathLike[str],
    retriever: Any = "bm25",
    cross_encoder: Any = None,
    num_negatives: int = 9,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    sampling_strategy: Literal["top", "random"] = "top",
    labels: Literal["relevance", "teacher", "scores"] = "relevance",
    seed: int = 12,
    columns: Mapping[str, str] | None = None,
    batch_size: int | None = None,
    query_batch_size: int = 1024,
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> MiningResult:
    """Write one ranking list per query: its positives and hard negatives from the corpus.

    A list is {"query", "docs", "labels"}, what `Trainer` reads. Its documents are in an order drawn
    by the seed: with positives first an evaluator with stable ties would find them without a model.
    All positives of a query are in its one list. Documents of one text are one document, and a text
    that is a positive of the query is never its negative. Lists are written as they come; an
    interrupted run goes on where it stopped when it is started again with the same arguments.

    Options have the meaning that they have in sentence-transformers' `mine_hard_negatives`, with
    these differences: a cross-encoder always rescores; BM25 finds no document that shares no term
    with the query; several positives give one list; random sampling never takes a candidate that a
    filter skipped.

    Args:
        queries: a .jsonl or .parquet file, a saved dataset's directory or hub id, a Dataset or a
            sequence of mappings, with the columns query and either positives (one text or several),
            positive_ids (ids of the corpus), or docs and labels (existing ranking lists: labels
            above 0 are positives, all docs join the corpus). Rows of the same query are merged; one
            without a positive is left out and counted.
        corpus: a file, dataset or sequence of mappings with the columns text and id (or _id,
            doc_id), a list of strings (their ids are their positions), or a mapping of id to text.
            Positives join it.
            None: only the texts that the queries bring along.
        output: .jsonl or .parquet file. OUTPUT.mining.json beside it keeps the settings.
        retriever: "bm25"; an encoder (a sentence-transformers model, or a callable from texts to
            embeddings); or a `BM25Retriever`, a `DenseRetriever` or another object with their
            methods.
        cross_encoder: an object with `predict(pairs)`, whose scores replace the retriever's.
        num_negatives: most negatives per list; with one positive 9 make the 10 documents of MS
            MARCO's lists.
        range_min: skip this many of the best candidates that pass the filters.
        range_max: candidates up to this rank. None: range_min + num_negatives + the most positives
            of a query; 10 times num_negatives where a filter or a cross-encoder may skip or reorder
            candidates.
        max_score: a candidate with a higher score is skipped.
        min_score: a candidate with a lower score is skipped.
        absolute_margin: skip candidates above the score of the query's lowest-scored positive minus
            this.
        relative_margin: skip candidates above that score minus this fraction of its magnitude. The
            margins and max_score are what keeps unlabelled positives (false negatives) out, best
            with a cross-encoder's scores.
        sampling_strategy: "top", or "random" among the candidates up to range_max.
        labels: "relevance": the positives' own labels (1 where there are none), 0 for negatives.
            "teacher": the cross-encoder's scores scaled per list to 0-4, graded labels for
            distillation with LambdaLoss whatever the range of the scores (all equal: positives 4,
            others 0). "scores": the scores as they are.
        seed: of the documents' order and of random sampling.
        columns: the sources' own names of query, positives, positive_ids, docs, labels, id and
            text.
        batch_size: passed to the cross-encoder's predict.
        query_batch_size: queries searched together.
        overwrite: begin anew where output exists.
        show_progress_bar: of indexing, encoding and mining.

    Raises:
        ValueError: an option is out of its range; a row is malformed (names file and line);
            positive_ids are not in the corpus; output exists and is not the interrupted or complete
            result of this very run, is being written by another process, or can't be written: what
            was written before stays.
    """
    path = Path(output)
    _check_output(path, queries, corpus)
    selection = Selection(
        num_negatives, range_min, range_max, max_score, min_score,
        absolute_margin, relative_margin, sampling_strategy, seed,
    )  # fmt: skip
    _check_options(labels, cross_encoder, query_batch_size)
    first_stage = _retriever(retriever)
    with locked(path):
        collection = load_collection(queries, corpus, columns=columns)
        selection = selection.with_range(
            max(map(len, collection.positives)), rescored=cross_encoder is not None
        )
        miner = _Miner(collection, first_stage, cross_encoder, selection, labels, batch_size)
        writer = ListWriter(path, miner.settings(), collection.queries, overwrite=overwrite)
        return _mine(miner, writer, query_batch_size, show_progress_bar)


def _check_output(path: Path, queries: Any, corpus: Any) -> None:
    check_output(path)
    for source in (queries, corpus):
        if isinstance(source, str | Path) and Path(source).resolve() == path.resolve():
            raise ValueError(f"output {path} is one of the inputs: expected another file")


def _check_options(labels: str, cross_encoder: Any, query_batch_size: int) -> None:
    if labels not in ("relevance", "teacher", "scores"):
        raise ValueError(f"labels must be relevance, teacher or scores, got {labels!r}")
    if labels == "teacher" and cross_encoder is None:
        raise ValueError("labels='teacher' needs a cross_encoder")
    if query_batch_size < 1:
        raise ValueError(f"query_batch_size must be at least 1, got {query_batch_size}")
    if cross_encoder is not None and not hasattr(cross_encoder, "predict"):
        raise ValueError(f"cross_encoder must have predict, got {type(cross_encoder).__name__}")


def _retriever(retriever: Any) -> Retriever:
    if isinstance(retriever, str):
        if retriever != "bm25":
            raise ValueError(
                f"retriever must be 'bm25', an encoder or a retriever, got {retriever!r}"
            )
        return BM25Retriever()
    return retriever if isinstance(retriever, Retriever) else DenseRetriever(retriever)


def _mine(
    miner: _Miner, writer: ListWriter, query_batch_size: int, show_progress_bar: bool
) -> MiningResult:
    """The lists that are not in the file yet."""
    collection, path = miner.collection, writer.output
    result = MiningResult(
        str(path),
        lists=writer.lists,
        resumed_lists=writer.lists,
        documents=len(collection.corpus),
        duplicate_documents=collection.duplicates,
        queries=len(collection.queries),
        queries_without_positive=collection.without_positive,
    )
    if collection.without_positive:
        logger.warning("queries without a positive, left out: %d", collection.without_positive)
    if writer.complete:
        logger.info("%s is complete: nothing to do", path)
        return result
    if writer.position:
        logger.info("%s: going on after %d lists", path, writer.lists)
    skipped = miner.selection.skipped
    with writer:
        if writer.position < len(collection.queries):
            miner.retriever.index(
                collection.corpus, collection.queries, show_progress_bar=show_progress_bar
            )
            miner.run(writer, result, query_batch_size, show_progress_bar)
        if not writer.lists:
            raise ValueError(
                f"no candidate passed for any of the {len(collection.queries)} queries; "
                f"skipped: {dict(skipped) or 'none, the retriever found nothing'}"
            )
        writer.finish()
    result.lists = writer.lists
    result.skipped_candidates = dict(skipped)
    return result


@dataclass
class _Miner:
    collection: Collection
    retriever: Retriever
    cross_encoder: Any
    selection: Selection
    labels: Literal["relevance", "teacher", "scores"]
    batch_size: int | None

    def settings(self) -> dict[str, Any]:
        """What the file depends on: one that others wrote is not gone on with."""
        collection, cross_encoder = self.collection, self.cross_encoder
        return {
            **self.retriever.settings(),
            "cross_encoder": None if cross_encoder is None else model_fingerprint(cross_encoder),
            **self.selection.settings(),
            "labels": self.labels,
            "corpus": text_fingerprint(collection.corpus),
            "queries": text_fingerprint([*collection.queries, *map(repr, collection.positives)]),
        }

    def run(
        self,
        writer: ListWriter,
        result: MiningResult,
        query_batch_size: int,
        show_progress_bar: bool,
    ) -> None:
        total = len(self.collection.queries)
        assert self.selection.range_max is not None
        # A query's own positives among the best take no candidate's place.
        most = self.selection.range_max + max(map(len, self.collection.positives))
        k = min(most, len(self.collection.corpus))
        position = writer.position
        bar = tqdm(
            total=total,
            initial=position,
            desc="Mining",
            unit="query",
            disable=not show_progress_bar,
        )
        with bar:
            # From a batch's start even where its first lists are there: the same batches give the
            # same bits.
            for start in range(
                position // query_batch_size * query_batch_size, total, query_batch_size
            ):
                stop = min(start + query_batch_size, total)
                positives = [list(found) for found in self.collection.positives[start:stop]]
                found = self.retriever.search(start, stop, k, positives)
                for group in range(start, stop, _GROUP):
                    numbers = range(group, min(group + _GROUP, stop))
                    if numbers.stop <= position:
                        continue
                    candidates = [
                        self._candidates(i, found.indices[i - start], found.scores[i - start])
                        for i in numbers
                    ]
                    positive_scores = found.positive_scores[
                        numbers.start - start : numbers.stop - start
                    ]
                    scored = self._rescore(numbers, candidates, positive_scores)
                    for i, scores in zip(numbers, scored, strict=True):
                        if i >= position:
                            self._write(i, *scores, writer, result)
                    writer.flush()
                    bar.update(numbers.stop - max(position, numbers.start))

    def _candidates(
        self, query: int, indices: np.ndarray, scores: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What was found, without the query's positives."""
        keep = (indices >= 0) & ~np.isin(indices, list(self.collection.positives[query]))
        return indices[keep], scores[keep]

    def _rescore(
        self,
        numbers: range,
        candidates: list[tuple[np.ndarray, np.ndarray]],
        positive_scores: list[np.ndarray],
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(indices, scores, positive scores) of each query, scored by the cross-encoder where there
        is one.
        """
        if self.cross_encoder is None:
            return [
                (*found, scores) for found, scores in zip(candidates, positive_scores, strict=True)
            ]
        corpus = self.collection.corpus
        pairs, ends = [], []
        for i, (indices, _) in zip(numbers, candidates, strict=True):
            query = self.collection.queries[i]
            pairs += [
                (query, corpus[j]) for j in [*indices.tolist(), *self.collection.positives[i]]
            ]
            ends.append(len(pairs))
        options = {} if self.batch_size is None else {"batch_size": self.batch_size}
        scores = np.asarray(
            self.cross_encoder.predict(pairs, show_progress_bar=False, **options), np.float32
        )
        if scores.shape != (len(pairs),):
            raise ValueError(
                f"the cross-encoder gave {scores.shape} for {len(pairs)} pairs, not one for each"
            )
        if not np.isfinite(scores).all():
            bad = pairs[int(np.flatnonzero(~np.isfinite(scores))[0])]
            raise ValueError(f"the cross-encoder's score is not finite for the pair {bad!r:.200}")
        parts = np.split(scores, ends[:-1])
        return [
            (indices, part[: len(indices)], part[len(indices) :])
            for (indices, _), part in zip(candidates, parts, strict=True)
        ]

    def _write(
        self,
        query: int,
        indices: np.ndarray,
        scores: np.ndarray,
        positive_scores: np.ndarray,
        writer: ListWriter,
        result: MiningResult,
    ) -> None:
        chosen = self.selection.select(query, indices, scores, positive_scores)
        if not len(chosen):
            result.queries_without_negative += 1
            return
        positives = self.collection.positives[query]
        docs = [self.collection.corpus[i] for i in [*positives, *indices[chosen].tolist()]]
        relevance = [*positives.values(), *[0.0] * len(chosen)]
        values = grade(self.labels, relevance, np.concatenate([positive_scores, scores[chosen]]))
        # Another stream than sampling's.
        order = (
            np.random.default_rng([self.selection.seed, query, 1]).permutation(len(docs)).tolist()
        )
        writer.write(
            {
                "query": self.collection.queries[query],
                "docs": [docs[i] for i in order],
                "labels": [
                    int(values[i]) if values[i] == int(values[i]) else values[i] for i in order
                ],
            }
        )
        result.positives += len(positives)
        result.negatives += len(chosen)
        result.lists_with_fewer_negatives += len(chosen) < self.selection.num_negatives
