from __future__ import annotations

import copy
import json
import logging
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from datasets import IterableDataset

from rerank_fast import CrossEncoder
from rerank_fast.data import load_lists, tokenize_lists
from rerank_fast.data.batches import (
    BatchMaker,
    sample_documents,
    share_out,
    shuffle_within_buffer,
    token_load,
)
from rerank_fast.data.lists import ListStream
from rerank_fast.objectives.lambda_loss import LambdaLoss
from tests.model_factory import make_tiny_bert
from tests.training.conftest import make_lists


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return CrossEncoder(make_tiny_bert(tmp_path_factory.mktemp("batches") / "bert"), device="cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_lists(23)))
    return path


def test_an_epoch_holds_every_list_once_and_the_next_one_in_another_order(model: CrossEncoder):
    maker = BatchMaker(make_lists(23), model, LambdaLoss(), batch_size=5)
    batches = list(islice(maker.batches(), 10))
    assert [(batch.epoch, batch.number) for batch in batches] == [
        (e, n) for e in (0, 1) for n in range(5)
    ]
    epochs = [
        np.concatenate([batch.indices for batch in batches if batch.epoch == epoch])
        for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(23)) for order in epochs)
    assert not np.array_equal(*epochs)
    assert [len(batch.indices) for batch in batches[:5]] == [5, 5, 5, 5, 3]


@pytest.mark.parametrize("streamed", [False, True])
def test_from_any_position_the_batches_are_those_of_the_whole_run(
    model: CrossEncoder, file: Path, streamed: bool
):
    lists = ListStream(str(file)) if streamed else load_lists(str(file))
    maker = BatchMaker(
        lists, model, LambdaLoss(), batch_size=4, shuffle_buffer=7, max_docs_per_list=3
    )
    whole = list(islice(maker.batches(), 14))
    for start in (0, 3, 6, 8):
        first = whole[start]
        for a, b in zip(whole[start:], maker.batches(first.epoch, first.number), strict=False):
            assert (a.epoch, a.number) == (b.epoch, b.number)
            assert a.indices.tolist() == b.indices.tolist()
            assert np.array_equal(a.lists.pairs.input_ids, b.lists.pairs.input_ids)


class ReadOnce(ListStream):
    """A stream that holds nothing when it is read again, as an exhausted generator does."""

    times = 0

    def __iter__(self):
        self.times += 1
        # The first time it is only looked at.
        return super().__iter__() if self.times < 3 else iter(())


def test_a_stream_that_has_run_dry_is_said(model: CrossEncoder, file: Path):
    batches = BatchMaker(ReadOnce(str(file)), model, LambdaLoss(), batch_size=20).batches()
    assert [len(batch.indices) for batch in islice(batches, 2)] == [20, 3]
    with pytest.raises(ValueError, match="epoch 1 of the training lists holds no list"):
        next(batches)


def test_truncation_is_said_once(model: CrossEncoder, caplog: pytest.LogCaptureFixture):
    rows = [{"query": "panda", "docs": ["sea " * 100, "bear"], "labels": [1.0, 0.0]}] * 6
    model = copy.deepcopy(model)  # of which nothing has been said
    batches = list(
        islice(BatchMaker(load_lists(rows), model, LambdaLoss(), batch_size=2).batches(), 5)
    )
    assert [batch.lists.truncated for batch in batches] == [2] * 5
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert [message.split(";")[0] for message in warnings] == [
        "2 of 4 pairs are longer than max_length=64 tokens and were truncated"
    ]
    assert model.truncated_pairs == {64: 10}


def test_the_ranks_shares_make_up_the_batch_and_know_its_pairs(model: CrossEncoder):
    lists = [*make_lists(12), {"query": "panda", "docs": ["bear", "fish"], "labels": [1.0, 1.0]}]
    lists = load_lists([dict(row) for row in lists])
    whole = next(BatchMaker(lists, model, LambdaLoss(), batch_size=13).batches())
    shares = [
        next(BatchMaker(lists, model, LambdaLoss(), batch_size=13, rank=r, num_ranks=3).batches())
        for r in range(3)
    ]
    together = sorted(
        tuple(s.pairs.select(np.array([i])).input_ids)
        for b in shares
        for s in [b.lists]
        for i in range(len(s.pairs))
    )
    assert together == sorted(
        tuple(whole.lists.pairs.select(np.array([i])).input_ids)
        for i in range(len(whole.lists.pairs))
    )
    expected = sum(a > b for row in lists for a in row["labels"] for b in row["labels"])
    assert {(b.units, len(b.indices), b.num_documents) for b in (*shares, whole)} == {
        (expected, 13, sum(len(row["docs"]) for row in lists) - 2)
    }
    assert len(whole.lists) == 12  # the one without a preference pair is counted, not scored
    ndcg1 = next(BatchMaker(lists, model, LambdaLoss("ndcg1"), batch_size=13).batches())
    assert ndcg1.units == sum(len(row["docs"]) ** 2 for row in lists)
    assert len(ndcg1.lists) == 13


def test_lists_are_shared_out_by_load(model: CrossEncoder):
    loads = np.array([100, 1, 1, 1, 50, 49, 1])
    shares = share_out(loads, 2)
    assert sorted(np.concatenate(shares).tolist()) == list(range(7))
    totals = [int(loads[share].sum()) for share in shares]
    assert abs(totals[0] - totals[1]) <= 3
    assert [len(part) for part in share_out(np.array([5]), 3)] == [1, 0, 0]
    # The load, told from the texts, is about the tokens that there will be; by count the shares
    # differ more.
    draw = np.random.default_rng(0)
    rows = [
        {
            "query": "what is the panda",
            "docs": ["the panda eats bamboo " * int(n)] * int(m),
            "labels": [1.0] * int(m),
        }
        for n, m in zip(draw.integers(1, 12, 64), draw.integers(1, 9, 64), strict=True)
    ]
    tokens = np.array(
        [model.tokenize([(row["query"], doc) for doc in row["docs"]]).lengths.sum() for row in rows]
    )
    loads = np.array([token_load(row, model.max_length) for row in rows])
    by_load = [tokens[share].sum() for share in share_out(loads, 4)]
    by_count = [part.sum() for part in np.array_split(tokens, 4)]
    assert max(by_load) / np.mean(by_load) < 1.05 < max(by_count) / np.mean(by_count)


def test_sampling_keeps_the_relevant_documents_and_a_place_for_another():
    row = {"query": "q", "docs": [f"d{i}" for i in range(20)], "labels": [1.0, 2.0] + [0.0] * 18}
    drawn = {tuple(sample_documents(row, 5, (0, 0, seed))["docs"]) for seed in range(40)}
    assert len(drawn) > 20
    for docs in drawn:
        assert len(docs) == 5
        assert docs[:2] == ("d0", "d1")
        assert list(docs) == sorted(docs, key=lambda name: int(name[1:]))
    assert sample_documents(row, 5, (3, 1, 2)) == sample_documents(row, 5, (3, 1, 2))
    assert sample_documents(row, 20, (0, 0, 0)) is row
    crowd = {"query": "q", "docs": [f"d{i}" for i in range(9)], "labels": [1.0] * 8 + [0.0]}
    sampled = sample_documents(crowd, 3, (0, 0, 0))
    assert sampled["labels"] == [1.0, 1.0, 0.0]


def test_the_shuffle_buffer_gives_every_item_once_and_holds_no_more_than_its_size():
    read: list[int] = []

    def items():
        for i in range(100):
            read.append(i)
            yield i

    given: list[int] = []
    for item in shuffle_within_buffer(items(), 10, (1,)):
        given.append(item)
        assert len(read) - len(given) <= 10
    assert sorted(given) == list(range(100))
    assert given != sorted(given)
    assert list(shuffle_within_buffer(iter(range(100)), 10, (1,))) == given
    assert sorted(shuffle_within_buffer(iter(range(5)), 10, (1,))) == list(range(5))


def test_streams_are_read_lazily_and_checked(file: Path, tmp_path: Path):
    rows = list(ListStream(str(file)))
    assert rows == [dict(row) for row in load_lists(str(file))]
    hub_like = IterableDataset.from_generator(lambda: iter([dict(row) for row in make_lists(23)]))
    assert list(ListStream(hub_like)) == rows
    bad = tmp_path / "bad.jsonl"
    bad.write_text(file.read_text() + '{"query": "q", "docs": ["a"], "labels": ["x"]}\n')
    stream = ListStream(str(bad))  # the first row is sound
    with pytest.raises(ValueError, match=r"bad.jsonl, line 24, field labels\[0\]"):
        list(stream)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no list"):
        ListStream(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="does not exist"):
        ListStream(str(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [1.0]}, "list 1: 2 documents but 1 labels"),
        ({"labels": [1.0, None]}, r"list 1, labels\[1\]: expected a number, got NoneType None"),
        ({"labels": 1.0}, "list 1, labels: expected a label for each document, got float 1.0"),
        ({"docs": ["bear", None]}, "pair 3, document: expected a string, got NoneType None"),
        ({"query": "\ud800"}, "pair 2, query: not valid Unicode"),
    ],
)
def test_lists_that_can_not_be_tokenised(model: CrossEncoder, changes: dict, message: str):
    row = {"query": "panda", "docs": ["bear", "fish"], "labels": np.array([1, 0])}
    assert tokenize_lists([row], model).labels.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=message):
        tokenize_lists([row, row | changes], model)
