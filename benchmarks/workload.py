"""Texts and lists that the benchmarks share: as long as MS MARCO's."""

from __future__ import annotations

import numpy as np

_WORDS = (
    "river stone people population city weather question model light water energy history music "
    "price doctor law"
)


def words_like_marco(generator: np.random.Generator, length: int | None = None) -> str:
    """A text of this many words; None draws it as MS MARCO's passages have them."""
    length = length or int(np.clip(generator.lognormal(4.3, 0.45), 10, 240))
    return " ".join(generator.choice(_WORDS.split(), length))


def marco_like_lists(
    num_lists: int, *, seed: int = 0, log_words: float = 4.3, spread: float = 0.45, most: int = 240
) -> list[dict]:
    """Lists of 3 to 10 documents of log-normal length: about 92 tokens a pair in the mean."""
    generator = np.random.default_rng(seed)
    words = _WORDS.split()
    lists = []
    for _ in range(num_lists):
        size = int(generator.integers(3, 11))
        lengths = np.clip(generator.lognormal(log_words, spread, size), 10, most).astype(int)
        docs = [" ".join(generator.choice(words, length)) for length in lengths]
        labels = [0] * size
        labels[int(generator.integers(size))] = 1
        lists.append(
            {"query": " ".join(generator.choice(words, 7)), "docs": docs, "labels": labels}
        )
    return lists
