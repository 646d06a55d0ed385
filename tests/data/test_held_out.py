from __future__ import annotations

import logging
import unicodedata
from itertools import chain

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from rerank_fast.data.held_out import hold_out, normalized, queries_of, query_keys
from rerank_fast.data.lists import load_lists

# Spellings of one query each, and no two of them of the same.
_SPELLINGS = [
    ("What is a Panda?", "what  is a panda?", "\tWHAT IS A PANDA?\n", "what\u00a0is a panda?"),
    ("Straße in Zürich", "STRASSE IN ZÜRICH", "strasse in zu\u0308rich"),
    ("ﬁne ① Å", "fine 1 å", "FINE 1 A\u030a"),
    ("ΣΊΣΥΦΟΣ", "σίσυφος"),
    ("what is a panda", "What is a panda"),
    ("résumé",),
    ("resume",),
]


def _lists(queries: list[str]) -> Dataset:
    documents = [[f"d{i}", "e"] for i in range(len(queries))]
    rows = zip(queries, documents, strict=True)
    return load_lists([{"query": query, "docs": docs, "labels": [1, 0]} for query, docs in rows])


@pytest.mark.parametrize("spellings", _SPELLINGS)
def test_spellings_of_a_query_are_one_query(spellings: tuple[str, ...]):
    assert len({normalized(one) for one in spellings}) == 1
    assert len(np.unique(query_keys(spellings))) == 1


def test_other_queries_are_others():
    assert len(np.unique(query_keys(one[0] for one in _SPELLINGS))) == len(_SPELLINGS)


@given(st.text())
def test_a_normalised_text_is_left_as_it_is(text: str):
    once = normalized(text)
    assert normalized(once) == once
    assert normalized(unicodedata.normalize("NFD", text.casefold())) == once or "\u0345" in text


@given(
    st.lists(st.sampled_from([*chain(*_SPELLINGS)]), min_size=2, max_size=40),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
)
def test_no_query_is_on_both_sides_and_the_held_out_lists_are_as_many_as_asked(
    queries: list[str], count: int, seed: int
):
    lists = _lists(queries)
    try:
        kept, held = hold_out(lists, count, seed=seed)
    except ValueError:
        # Refused only where the drawn queries may leave none.
        sizes = np.unique(query_keys(queries), return_counts=True)[1]
        assert count > len(queries) - sizes.max()
        return
    assert len(held) == count
    assert len(kept)
    drawn = {normalized(one) for one in held["query"]}
    assert not drawn & {normalized(one) for one in kept["query"]}
    places = [doc[0] for doc in [*kept["docs"], *held["docs"]]]
    assert len(set(places)) == len(places)  # no list twice
    # What is in neither is of a held-out query.
    left = {f"d{i}" for i in range(len(queries))} - set(places)
    assert {normalized(queries[int(place[1:])]) for place in left} <= drawn


def test_the_draw_is_the_seeds_and_keeps_the_order_of_the_lists():
    lists = _lists([f"query {i % 30}" for i in range(60)])
    kept, held = hold_out(lists, 10, seed=12)
    again = hold_out(lists, 10, seed=12)
    assert [kept["query"][:], held["query"][:]] == [part["query"][:] for part in again]
    assert held["query"][:] != hold_out(lists, 10, seed=13)[1]["query"][:]
    for part in (kept, held):
        places = [int(docs[0][1:]) for docs in part["docs"]]
        assert places == sorted(places)
    assert len(kept) == 50  # all queries have two lists: none is cut


def test_too_few_lists_or_queries_are_refused():
    with pytest.raises(ValueError, match="held_out is 3, but there are 3 lists in all"):
        hold_out(_lists(["a", "b", "c"]), 3, seed=12)
    with pytest.raises(ValueError, match="held_out is 1, but the 4 lists are of 1 queries in all"):
        hold_out(_lists(["a b", "A  B", "a b ", "\uff21 b"]), 1, seed=12)


def test_views_of_the_lists_and_no_copies_of_them(caplog: pytest.LogCaptureFixture):
    lists = _lists([f"query {i}" for i in range(5000)])
    with caplog.at_level(logging.INFO, logger="rerank_fast"):
        kept, held = hold_out(lists, 100, seed=12)
    assert "4900 lists of 4900 queries to train on; " in caplog.text
    assert "100 lists of 100 other queries held out" in caplog.text
    assert "seed 12" in caplog.text
    for part in (kept, held):
        assert part.data.nbytes == lists.data.nbytes  # the same table, behind indices
        assert part._indices is not None
    assert list(queries_of(held)) == held["query"][:]
