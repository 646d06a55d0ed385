"""Global batches of lists: their order, and each process's share of them."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from datasets import Dataset

from rerank_fast.data.in_batch import add_negatives
from rerank_fast.data.lists import ListStream
from rerank_fast.data.tokenized import TokenizedLists, tokenize_lists
from rerank_fast.objectives.base import Objective, Units

if TYPE_CHECKING:
    from rerank_fast.model.cross_encoder import CrossEncoder

logger = logging.getLogger(__name__)

T = TypeVar("T")
Row = dict[str, Any]  # {"query": str, "docs": [str], "labels": [float]}


@dataclass(frozen=True)
class Batch:
    """One process's share of a global batch, and what it must know of the whole."""

    lists: TokenizedLists  # those that this process scores
    indices: np.ndarray  # (Q,) rows of all lists of the global batch in their source
    epoch: int
    number: int  # of the batch in its epoch, from 0
    num_documents: int  # that all processes score
    units: Units  # of the objective in the global batch, without a cut by rank
    lists_without_gradient: int = 0  # of the global batch: they can't give a gradient
    negatives_added: int = 0  # from other lists, to all lists of the global batch


@dataclass(frozen=True)
class BatchMaker:
    """Makes the batches of a run, from any position.

    A list that can't give a gradient is counted, but neither tokenised nor scored unless it adds to
    the value of the loss. Every process reads all lists and tokenises its own.

    Args:
        lists: all lists in memory (or mapped), or a stream of them.
        model: tokenises; a thread of its own may use it.
        objective: counts its units and says which lists contribute; it checks the labels of a
            stream, each list as it is read.
        batch_size: lists of a global batch; the last one of an epoch may have fewer.
        seed: of the order and of the sampled documents; both differ from epoch to epoch.
        max_docs_per_list: most documents of a list; see sample_documents.
        in_batch_negatives: documents of other lists that each gets on top; see add_negatives.
        shuffle_buffer: lists of a stream among which the next one is drawn.
        rank: of this process.
        num_ranks: processes.
    """

    lists: Dataset | ListStream
    model: CrossEncoder
    objective: Objective
    batch_size: int
    seed: int = 12
    max_docs_per_list: int | None = None
    in_batch_negatives: int = 0
    shuffle_buffer: int = 10_000
    rank: int = 0
    num_ranks: int = 1

    def batches(self, epoch: int = 0, number: int = 0) -> Generator[Batch, None, None]:
        """Batches without end, beginning with one of an epoch; a stream is read again up to
        there.
        """
        said = False
        while True:
            order = self._stream_order if isinstance(self.lists, ListStream) else self._order
            at = -1
            for at, (indices, rows) in enumerate(order(epoch, number), start=number):
                batch = self._prepare(indices, rows, epoch, at)
                self.model.warn_of_truncation(batch.lists.truncated, len(batch.lists.pairs))
                if batch.lists_without_gradient and not said:
                    said = True
                    # All ranks know the same.
                    log = logger.warning if self.rank == 0 else logger.debug
                    log(
                        "Lists %s train nothing, %d of %d in the first batch that has one; "
                        "lists_without_gradient in the log counts them.",
                        self.objective.idle,
                        batch.lists_without_gradient,
                        len(indices),
                    )
                yield batch
            if at < 0 and number == 0:
                raise ValueError(
                    f"epoch {epoch} of the training lists holds no list: the stream has run dry"
                )
            epoch, number = epoch + 1, 0

    def _order(self, epoch: int, skip: int) -> Iterator[tuple[np.ndarray, list[Row]]]:
        assert isinstance(self.lists, Dataset)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lists))
        for start in range(skip * self.batch_size, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            columns = self.lists[indices.tolist()]
            yield (
                indices,
                [
                    dict(zip(columns, row, strict=True))
                    for row in zip(*columns.values(), strict=True)
                ],
            )

    def _stream_order(self, epoch: int, skip: int) -> Iterator[tuple[np.ndarray, list[Row]]]:
        shuffled = shuffle_within_buffer(
            enumerate(self.lists), self.shuffle_buffer, (self.seed, epoch)
        )
        chosen: list[tuple[int, Row]] = []
        for index, row in shuffled:
            check_labels(self.objective, row["labels"], index)
            chosen.append((index, row))
            if len(chosen) == self.batch_size:
                if skip == 0:
                    yield np.array([index for index, _ in chosen]), [row for _, row in chosen]
                skip, chosen = max(skip - 1, 0), []
        if chosen and skip == 0:
            yield np.array([index for index, _ in chosen]), [row for _, row in chosen]

    def _prepare(self, indices: np.ndarray, rows: list[Row], epoch: int, number: int) -> Batch:
        if self.max_docs_per_list is not None:
            rows = [
                sample_documents(row, self.max_docs_per_list, (self.seed, epoch, int(index)))
                for index, row in zip(indices, rows, strict=True)
            ]
        added = 0
        if self.in_batch_negatives:
            rows, added = add_negatives(
                rows, self.in_batch_negatives, (self.seed, epoch, number, 1)
            )
        labels = [np.asarray(row["labels"], dtype=np.float32) for row in rows]
        offsets = np.cumsum([0, *map(len, labels)])
        units = self.objective.num_units(np.concatenate(labels), offsets)
        contributes = [self.objective.contributes(values) for values in labels]
        if not self.objective.scores_idle:
            rows = [row for row, trains in zip(rows, contributes, strict=True) if trains]
        loads = np.array([token_load(row, self.model.max_length) for row in rows])
        mine = [rows[i] for i in share_out(loads, self.num_ranks)[self.rank]]
        num_documents = sum(len(row["docs"]) for row in rows)
        return Batch(
            tokenize_lists(mine, self.model),
            indices,
            epoch,
            number,
            num_documents,
            units,
            lists_without_gradient=len(contributes) - sum(contributes),
            negatives_added=added,
        )


def check_labels(objective: Objective, labels: Sequence[float], index: int) -> np.ndarray:
    """A list's labels (D,); raises ValueError, naming the list, where they do not fit the
    objective.
    """
    values = np.asarray(labels, dtype=np.float32)
    try:
        objective.check(values)
    except ValueError as error:
        raise ValueError(f"list {index} of the training lists, labels: {error}") from error
    return values


def check_all_labels(objective: Objective, lists: Dataset) -> str | None:
    """Checks every list's labels before training; gives the objective's advice on all of them.

    Raises:
        ValueError: labels that do not fit; names the list.
    """
    columns, every, index = lists.select_columns("labels").with_format(None), [], 0
    for rows in columns.iter(batch_size=1024):
        for labels in rows["labels"]:
            every.append(check_labels(objective, labels, index))
            index += 1
    return objective.advice(np.concatenate(every))


def shuffle_within_buffer(items: Iterator[T], size: int, seed: Sequence[int]) -> Iterator[T]:
    """Every item once, drawn from a buffer of this size that is refilled from the front of the
    rest.
    """
    draw = np.random.default_rng(seed)
    buffer: list[T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
        else:
            place = int(draw.integers(size))
            yield buffer[place]
            buffer[place] = item
    for place in draw.permutation(len(buffer)):
        yield buffer[place]


def sample_documents(row: Row, limit: int, seed: Sequence[int]) -> Row:
    """At most this many documents of a list, in their order; relevant ones (label above 0) stay,
    the rest is drawn.

    One place is kept for a document that is not relevant, where there is one: without it there
    would be no pair.
    """
    labels = np.asarray(row["labels"])
    if len(labels) <= limit:
        return row
    draw = np.random.default_rng(seed)
    positive, negative = (
        draw.permutation(np.flatnonzero(chosen)) for chosen in (labels > 0, labels <= 0)
    )
    positive = positive[: limit - 1 if len(negative) and limit > 1 else limit]
    kept = np.sort(np.concatenate([positive, negative[: limit - len(positive)]]))
    docs, values = row["docs"], row["labels"]
    return {
        "query": row["query"],
        "docs": [docs[i] for i in kept],
        "labels": [values[i] for i in kept],
    }


def token_load(row: Row, max_length: int | None) -> int:
    """About how many tokens a list's pairs have, not tokenised yet: four bytes a token, at most
    max_length.
    """
    query = len(row["query"].encode())
    loads = [(query + len(doc.encode())) // 4 + 3 for doc in row["docs"]]
    return sum(loads if max_length is None else (min(load, max_length) for load in loads))


def share_out(loads: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Indices of each rank's lists, in order: the heaviest list goes to the rank with the least
    load so far.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for index in np.argsort(-loads, kind="stable"):
        rank = totals.index(min(totals))
        shares[rank].append(int(index))
        totals[rank] += int(loads[index])
    return [np.sort(np.array(share, dtype=np.int64)) for share in shares]
