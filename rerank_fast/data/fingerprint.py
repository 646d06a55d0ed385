"""A digest of lists' texts and labels, in their order: what tells one training set from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset

from rerank_fast.data.lists import FEATURES


def fingerprint(lists: Dataset | Sequence[Mapping[str, Any]]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of queries, documents and labels, in order.

    Not the fingerprint that `datasets` keeps: that is of how a dataset was made, and differs with
    the library's version.

    Args:
        lists: as `load_lists` gives them, or rows of {"query", "docs", "labels"}.
    """
    if not isinstance(lists, Dataset):
        columns = {name: [row[name] for row in lists] for name in FEATURES}
        lists = Dataset.from_dict(columns, features=FEATURES)
    digest = hashlib.sha256()
    for table in lists.with_format("arrow").iter(batch_size=1024):
        docs, labels = (pyarrow.concat_arrays(table[name].chunks) for name in ("docs", "labels"))
        for texts in (pyarrow.concat_arrays(table["query"].chunks), docs.flatten()):
            texts = texts.cast(pyarrow.large_binary())
            _, offsets, characters = texts.buffers()
            ends = np.frombuffer(offsets, np.int64, len(texts) + 1, offset=8 * texts.offset)
            # Or the end of one text could be the beginning of the next.
            digest.update(np.diff(ends).tobytes())
            if characters is not None:
                digest.update(memoryview(characters)[ends[0] : ends[-1]])
        digest.update(docs.value_lengths().to_numpy().tobytes())
        digest.update(labels.flatten().to_numpy().tobytes())
    return digest.hexdigest()[:16]
