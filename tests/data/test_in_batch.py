"""Documents of other lists as negatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rerank_fast import CrossEncoder
from rerank_fast.data import load_lists
from rerank_fast.data.batches import BatchMaker
from rerank_fast.data.held_out import normalized
from rerank_fast.data.in_batch import add_negatives
from rerank_fast.objectives.lambda_loss import LambdaLoss
from tests.model_factory import make_tiny_bert

ROWS = [
    {"query": "panda", "docs": ["a bear", "bamboo"], "labels": [2.0, 1.0]},
    {"query": " PANDA", "docs": ["asia", "the sea"], "labels": [1.0, 0.0]},
    {"query": "fish", "docs": ["The  Sea", "rain", "rain"], "labels": [1.0, 0.0, 0.0]},
    {"query": "wind", "docs": ["sun"], "labels": [1.0]},
]


@pytest.mark.parametrize("count", [1, 3, 99])
def test_none_is_the_lists_own_nor_of_a_list_of_its_query(count: int):
    longer, added = add_negatives(ROWS, count, (1,))
    for before, after in zip(ROWS, longer, strict=True):
        size = len(before["docs"])
        assert (after["query"], after["docs"][:size]) == (before["query"], before["docs"])
        assert after["labels"] == [*before["labels"], *[0.0] * (len(after["docs"]) - size)]
        key = normalized(before["query"])
        own = {
            normalized(doc)
            for row in ROWS
            if normalized(row["query"]) == key
            for doc in row["docs"]
        }
        drawn = [normalized(doc) for doc in after["docs"][size:]]
        assert not own & set(drawn)
        assert len(set(drawn)) == len(drawn)
        everything = {normalized(doc) for row in ROWS for doc in row["docs"]}
        assert len(drawn) == min(count, len(everything - own))
    assert added == sum(map(len, (row["docs"] for row in longer))) - sum(
        map(len, (row["docs"] for row in ROWS))
    )
    assert add_negatives(ROWS, count, (1,)) == (longer, added)


def test_the_draw_is_by_seed():
    rows = [{"query": f"q{i}", "docs": [f"d{i}"], "labels": [1.0]} for i in range(20)]
    assert add_negatives(rows, 3, (1,)) != add_negatives(rows, 3, (2,))
    drawn = {tuple(add_negatives(rows, 1, (seed,))[0][0]["docs"]) for seed in range(60)}
    assert len(drawn) > 10


def test_every_number_of_processes_has_one_batch(tmp_path):
    model = CrossEncoder(make_tiny_bert(tmp_path / "bert"), device="cpu")
    lists = load_lists(ROWS)

    def first(**of_ranks):
        return next(
            BatchMaker(
                lists, model, LambdaLoss(), batch_size=4, in_batch_negatives=2, **of_ranks
            ).batches()
        )

    whole, shares = first(), [first(rank=rank, num_ranks=2) for rank in range(2)]
    assert {batch.negatives_added for batch in (whole, *shares)} == {8}
    assert {batch.units for batch in (whole, *shares)} == {whole.units}
    pairs = [
        tuple(whole.lists.pairs.select(np.array([i])).input_ids)
        for i in range(len(whole.lists.pairs))
    ]
    theirs = [
        tuple(share.lists.pairs.select(np.array([i])).input_ids)
        for share in shares
        for i in range(len(share.lists.pairs))
    ]
    assert sorted(pairs) == sorted(theirs)
    assert whole.lists_without_gradient == 0  # the list of one document has a pair now
    assert torch.from_numpy(whole.lists.labels).sum() == 6
