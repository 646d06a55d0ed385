"""Where the rows of embeddings lie, as the host says it to a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rerank_fast.model.packed.embeddings import WordPlaces


@pytest.mark.parametrize("count", [40, 70_000, 2**18])
@pytest.mark.parametrize("unread", [None, 7])
def test_the_tokens_of_each_word_are_in_order(count: int, unread: int | None) -> None:
    drawn = np.random.default_rng(0).choice([0, 3, 7, count // 2, count - 1], 50)
    values = torch.from_numpy(WordPlaces.values(drawn, count, unread))
    assert len(values) == WordPlaces.size(50, count)
    places = WordPlaces.within(values, 50)
    assert places.ids.tolist() == drawn.tolist()
    found = {
        word: places.order[places.starts[word] : places.starts[word + 1]].tolist()
        for word in range(count)
        if places.starts[word] < places.starts[word + 1]
    }
    words = sorted(set(drawn.tolist()) - {unread})
    assert found == {word: np.flatnonzero(drawn == word).tolist() for word in words}


def test_rows_are_gathered_and_their_gradients_summed() -> None:
    pytest.importorskip("triton")
    table = torch.randn(9, 5, dtype=torch.bfloat16, requires_grad=True)
    words = np.array([3, 8, 3, 0, 3])
    places = WordPlaces.within(torch.from_numpy(WordPlaces.values(words, 9, unread=0)), 5)
    rows = places.rows(table)
    assert torch.equal(rows, table[words])
    upstream = torch.randn(5, 5, dtype=torch.bfloat16)
    rows.backward(upstream)
    expected = torch.zeros(9, 5).index_add(0, torch.from_numpy(words), upstream.float())
    expected[0] = 0
    assert table.grad is not None
    assert table.grad.dtype == torch.bfloat16
    torch.testing.assert_close(table.grad.float(), expected, rtol=1e-2, atol=1e-2)
