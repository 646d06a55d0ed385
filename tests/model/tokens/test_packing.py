from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_fast.model.tokens.packing import (
    MAX_TOKENS,
    TokenizedPairs,
    fill_up,
    most_tokens,
    plan_micro_batches,
    row_count,
    upload,
)


def make_pairs(lengths: list[int], *, types: bool = True) -> TokenizedPairs:
    """Pair n holds the ids 100 n + 1, 100 n + 2, ...; its second half is of type 1."""
    ids = [100 * n + i for n, length in enumerate(lengths) for i in range(1, length + 1)]
    kinds = [int(i > length // 2) for length in lengths for i in range(1, length + 1)]
    return TokenizedPairs(
        np.array(ids, np.int32),
        np.array(kinds, np.int8) if types else None,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def test_select_keeps_the_given_order():
    chosen = make_pairs([2, 3, 1]).select(np.array([2, 0, 0]))
    assert chosen.input_ids.tolist() == [201, 1, 2, 1, 2]
    assert chosen.offsets.tolist() == [0, 1, 3, 5]
    assert chosen.token_type_ids is not None
    assert chosen.token_type_ids.tolist() == [1, 0, 1, 0, 1]
    assert len(make_pairs([2, 3]).select(np.array([], dtype=int))) == 0


def test_concatenate_is_the_inverse_of_select():
    pairs = make_pairs([2, 3, 1])
    parts = [pairs.select(np.array([n])) for n in range(3)]
    again = TokenizedPairs.concatenate(parts)
    assert again.input_ids.tolist() == pairs.input_ids.tolist()
    assert again.offsets.tolist() == pairs.offsets.tolist()
    assert len(TokenizedPairs.concatenate([])) == 0
    with pytest.raises(ValueError, match="1 of 2 parts have token_type_ids"):
        TokenizedPairs.concatenate([make_pairs([2]), make_pairs([2], types=False)])


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_as_wide_as_the_longest_chosen_pair(side: str):
    batch = make_pairs([2, 9, 3]).pad(
        np.array([2, 0]), pad_token_id=7, padding_side=side, pad_token_type_id=5
    )
    if side == "right":
        assert batch["input_ids"].tolist() == [[201, 202, 203], [1, 2, 7]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert batch["token_type_ids"].tolist() == [[0, 1, 1], [0, 1, 5]]
    else:
        assert batch["input_ids"].tolist() == [[201, 202, 203], [7, 1, 2]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
        assert batch["token_type_ids"].tolist() == [[0, 1, 1], [5, 0, 1]]
    assert "token_type_ids" not in make_pairs([2], types=False).pad(np.array([0]), pad_token_id=0)


@given(st.lists(st.integers(1, 512), max_size=60), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_plan_holds_every_pair_once_longest_first(lengths: list[int], max_pairs: int):
    plan = plan_micro_batches(np.array(lengths, dtype=np.int64), max_pairs=max_pairs)
    assert sorted(i for part in plan for i in part) == list(range(len(lengths)))
    assert all(1 <= len(part) <= max_pairs for part in plan)
    taken = [lengths[i] for part in plan for i in part]
    assert taken == sorted(lengths, reverse=True)


def test_plan_refuses_empty_micro_batches():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plan_micro_batches(np.array([3]), max_pairs=0)


def test_row_counts_are_few_and_add_little():
    sizes = np.arange(1, MAX_TOKENS + 1)
    counts = np.array([row_count(int(size)) for size in sizes])
    assert (counts >= sizes).all()
    assert len(set(counts)) <= 64
    assert counts[0] == 4
    assert counts[-1] == MAX_TOKENS
    assert ((counts - sizes)[1000:] <= 0.07 * sizes[1000:]).all()


@given(st.lists(st.integers(1, 600), min_size=1, max_size=40))
@settings(deadline=None)
def test_a_filled_run_is_the_run_and_copies_of_its_first_token(lengths: list[int]):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    places, filled = fill_up(starts)
    assert places[: starts[-1]].tolist() == list(range(starts[-1]))
    assert not places[starts[-1] :].any()
    assert filled[: len(starts)].tolist() == starts.tolist()
    assert len(filled) > len(starts)
    assert filled[-1] == len(places)
    assert (np.diff(filled) > 0).all()
    assert len(filled) + 1 in {row_count(n) for n in range(1, len(filled) + 2)}
    assert not {len(filled), len(filled) - 1} & {row_count(n) for n in range(1, len(filled) + 2)}
    assert len(places) in {row_count(n) for n in range(1, len(places) + 1)}


def test_values_arrive_as_they_were():
    values = np.arange(6, dtype=np.int64)
    for one in (values, torch.from_numpy(values)):
        assert torch.equal(upload(one, torch.device("cpu")), torch.from_numpy(values))
        assert upload(one, torch.device("meta")).shape == (6,)


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 4096), ("cuda", 65536), ("mps", 4096)])
def test_a_gpu_takes_many_tokens(device: str, tokens: int):
    assert most_tokens(torch.device(device)) == tokens
