"""All that a step's encoder reads, filled up to a bucket from which every shape follows, in one
copy to the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rerank_fast.model.packed.architectures import Architecture
from rerank_fast.model.packed.embeddings import FusedEmbeddings, TokenPlaces, WordPlaces
from rerank_fast.model.tokens.packing import upload

FINE, COARSE = 5, 3  # binary digits that a bucket's numbers keep
_LEAST = 64, 8  # tokens and sequences of a bucket
_MOST_ROWS = 2**30  # where a step's numbers of rows begin: below 2**31 with any bucket's behind it
_ALIGNMENT = 4  # numbers of 4 bytes: Triton compiles for tensors that begin at 16


@dataclass(frozen=True)
class Bucket:
    """What all shapes follow from."""

    tokens: int
    sequences: int

    @staticmethod
    def of(num_tokens: int, num_sequences: int, digits: int) -> Bucket:
        """The least one with a sequence to spare, which has a token.

        That is a sixteenth more at most where it is FINE, a quarter where COARSE, or 64 tokens and
        8 sequences.
        """
        tokens, sequences = _LEAST
        sequences = _rounded(num_sequences + 1, sequences, digits)
        return Bucket(_rounded(num_tokens + sequences - num_sequences, tokens, digits), sequences)


def _rounded(count: int, least: int, digits: int) -> int:
    grain = max(least, 1 << max(count.bit_length() - digits, 0))
    return -(-count // grain) * grain


@dataclass(frozen=True)
class BucketInputs:
    """On the device, int32: T and N are the bucket's."""

    places: TokenPlaces | WordPlaces  # of BERT's embeddings, or of words alone
    positions: Tensor  # (1, T)
    types: Tensor  # (1, T)
    ends: Tensor  # (N + 1,) where the sequences begin, and T
    one_each: Tensor  # (N + 1,): 0, 1, ..., N
    token_rows: Tensor | None  # (T,) numbers of the tokens in the dropout, where there may be one
    sequence_rows: Tensor | None  # (N,) numbers of the sequences in it
    owner: Tensor | None  # (T,) sequence of each token, where all are pooled


class InputLayout:
    """How they lie one after the other.

    Args:
        architecture: of the model.
        embeddings: where one kernel serves them; None where words alone are gathered.
        trains: with what gradients and dropout read.
    """

    def __init__(
        self, architecture: Architecture, embeddings: FusedEmbeddings | None, *, trains: bool
    ) -> None:
        self._words, self._embeddings = architecture.word_embeddings, embeddings
        self._pools, self._trains = architecture.pool is not None, trains

    def _sizes(self, bucket: Bucket) -> list[int]:
        """Of the parts, in the order of BucketInputs."""
        tokens, sequences, words = bucket.tokens, bucket.sequences, self._words.num_embeddings
        if self._embeddings is None:
            first = [WordPlaces.size(tokens, words) if self._trains else tokens, tokens, tokens]
        else:  # whose places have positions and types in them
            positions = self._embeddings.positions.num_embeddings
            size = TokenPlaces.size(tokens, words, positions) if self._trains else 3 * tokens
            first = [size, 0, 0]
        rows = [tokens, sequences] if self._trains else [0, 0]
        return [*first, sequences + 1, sequences + 1, *rows, tokens if self._pools else 0]

    def parts(self, bucket: Bucket, values: Tensor) -> BucketInputs:
        """Of what upload gave."""
        sizes = self._sizes(bucket)
        rooms = values.split_with_sizes([_room(size) for size in sizes])
        found = [room.narrow(0, 0, size) for room, size in zip(rooms, sizes, strict=True)]
        places, positions, types, ends, one_each, token_rows, sequence_rows, owner = found
        rows = (token_rows, sequence_rows) if self._trains else (None, None)
        rest = (ends, one_each, *rows, owner if self._pools else None)
        if self._embeddings is None:
            words = self._word_places(places, bucket.tokens)
            return BucketInputs(words, positions[None], types[None], *rest)
        tokens = self._token_places(places, bucket.tokens)
        return BucketInputs(tokens, tokens.ids[1:2], tokens.ids[2:3], *rest)

    def _word_places(self, values: Tensor, num_tokens: int) -> WordPlaces:
        if self._trains:
            return WordPlaces.within(values, num_tokens)
        return WordPlaces(values, values[:0], values[:0])

    def _token_places(self, values: Tensor, num_tokens: int) -> TokenPlaces:
        num_words = self._words.num_embeddings
        if self._trains:
            return TokenPlaces.within(values, num_tokens, num_words)
        return TokenPlaces(values.view(3, num_tokens), values[:0], values[:0], num_words)

    def upload(
        self,
        bucket: Bucket,
        words: np.ndarray,
        positions: np.ndarray,
        types: np.ndarray,
        starts: np.ndarray,
    ) -> Tensor:
        """All parts with those of the sequences that fill the bucket up, which have copies of the
        first token, spread over them.
        """
        num_tokens, added = len(words), bucket.tokens - len(words)
        more = bucket.sequences - (len(starts) - 1)
        words, positions, types = (
            np.concatenate([one, np.full(added, one[0])]) for one in (words, positions, types)
        )
        ends = np.concatenate([starts, num_tokens + np.arange(1, more + 1) * added // more])
        padding, num_words = self._words.padding_idx, self._words.num_embeddings
        none = words[:0]
        if self._embeddings is None:
            places = WordPlaces.values(words, num_words, padding) if self._trains else words
            begin = [places, positions, types]
        elif self._trains:
            given = (words, positions, types, num_words, self._embeddings.positions)
            begin = [TokenPlaces.values(*given, words_unread=padding), none, none]
        else:
            begin = [np.concatenate([words, positions, types]), none, none]
        rows = [none, none]
        if self._trains:
            first = int(torch.randint(_MOST_ROWS, ()))
            rows = [first + np.arange(bucket.tokens), first + np.arange(bucket.sequences)]
        parts = [
            *begin,
            ends,
            np.arange(len(ends)),
            *rows,
            np.repeat(np.arange(bucket.sequences), np.diff(ends)) if self._pools else none,
        ]
        sizes = self._sizes(bucket)
        values, place = np.empty(sum(map(_room, sizes)), np.int32), 0
        for part, size in zip(parts, sizes, strict=True):
            values[place : place + size] = part
            place += _room(size)
        return upload(values, self._words.weight.device)


def _room(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
