"""What tells one training set from another."""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from rerank_fast.data.fingerprint import fingerprint
from rerank_fast.data.lists import FEATURES

ROWS = [
    {
        "query": f"query {n} ä",
        "docs": [f"doc {n} {i}" * i for i in range(1 + n % 4)],
        "labels": [0.5] * (1 + n % 4),
    }
    for n in range(2500)
]


@pytest.fixture(scope="module")
def lists() -> Dataset:
    return Dataset.from_list(ROWS, features=FEATURES)


def test_it_is_the_digest_of_lengths_and_bytes(lists: Dataset):
    digest = hashlib.sha256()
    for start in range(0, len(ROWS), 1024):
        rows = ROWS[start : start + 1024]
        docs = [doc for row in rows for doc in row["docs"]]
        for texts in ([row["query"] for row in rows], docs):
            encoded = [text.encode() for text in texts]
            digest.update(
                np.array([len(one) for one in encoded], dtype=np.int64).tobytes()
                + b"".join(encoded)
            )
        digest.update(np.array([len(row["docs"]) for row in rows], dtype=np.int32).tobytes())
        digest.update(
            np.array([one for row in rows for one in row["labels"]], dtype=np.float32).tobytes()
        )
    assert fingerprint(lists) == digest.hexdigest()[:16]


def test_it_is_of_the_content_however_that_is_stored(lists: Dataset):
    parts = [
        lists.select(range(700)),
        lists.select(range(700, 1333)),
        lists.select(range(1333, 2500)),
    ]
    back = list(range(2499, -1, -1))
    for same in (
        ROWS,
        concatenate_datasets(parts),
        lists.select(back).select(back),
        lists.with_format("numpy"),
    ):
        assert fingerprint(same) == fingerprint(lists)
    assert fingerprint(lists.select(range(3, 9))) == fingerprint(ROWS[3:9])


def test_every_change_counts():
    rows = copy.deepcopy(ROWS[:8])
    seen = {fingerprint(rows), fingerprint(rows[::-1]), fingerprint(rows[:-1])}

    def end_moved(
        rows: list,
    ) -> None:  # one character from the end of a document to the next one's beginning
        docs = rows[3]["docs"]
        docs[1], docs[2] = docs[1][:-1], docs[1][-1] + docs[2]

    def document_moved(
        rows: list,
    ) -> None:  # from the end of a list to the beginning of the next one
        for name in ("docs", "labels"):
            rows[3][name].insert(0, rows[2][name].pop())

    changes = [
        end_moved,
        document_moved,
        lambda rows: rows[0].update(query="query 0 a"),
        lambda rows: rows[7]["labels"].__setitem__(0, 1.0),
        lambda rows: rows[7]["docs"].reverse(),
    ]
    for change in changes:
        other = copy.deepcopy(rows)
        change(other)
        seen.add(fingerprint(other))
    assert len(seen) == 3 + len(changes)
    assert fingerprint([{"query": "q", "docs": [""], "labels": [0.0]}]) not in seen
