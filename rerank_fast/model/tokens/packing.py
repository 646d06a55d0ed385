"""Tokenised pairs in one flat run, and the planner that cuts them into micro-batches of similar
length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenizedPairs:
    """N (query, document) pairs as token ids without padding; pair n is offsets[n] to offsets[n +
    1].
    """

    input_ids: np.ndarray  # (T,) int32
    token_type_ids: np.ndarray | None  # (T,) int8; None where the tokenizer gives none
    offsets: np.ndarray  # (N + 1,) int64
    prompt_length: int = 0  # first tokens of each pair that a model's pooling leaves out

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64 tokens of each pair, special tokens included."""
        return np.diff(self.offsets)

    @staticmethod
    def concatenate(parts: Sequence[TokenizedPairs]) -> TokenizedPairs:
        """The pairs of all parts, in order. Parts must agree on whether they carry token types."""
        if not parts:
            return TokenizedPairs(np.zeros(0, np.int32), None, np.zeros(1, np.int64))
        types = [part.token_type_ids for part in parts if part.token_type_ids is not None]
        if types and len(types) != len(parts):
            raise ValueError(
                f"{len(types)} of {len(parts)} parts have token_type_ids; expected all or none"
            )
        return TokenizedPairs(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate(types) if types else None,
            np.concatenate(
                [[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]
            ).astype(np.int64),
            max(part.prompt_length for part in parts),
        )

    @staticmethod
    def from_padded(features: Mapping[str, Tensor]) -> TokenizedPairs:
        """The tokens under a (N, T) attention mask, padded on either side."""
        mask = features["attention_mask"].cpu().numpy().astype(bool)
        types = features.get("token_type_ids")
        return TokenizedPairs(
            features["input_ids"].cpu().numpy()[mask].astype(np.int32),
            None if types is None else types.cpu().numpy()[mask].astype(np.int8),
            np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int64),
            int(torch.as_tensor(features.get("prompt_length", 0)).max()),
        )

    def flat_index(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the tokens of the pairs at the (M,) indices, and their (M + 1,) offsets."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # A pair's start plus the token's place in the pair.
        return np.repeat(self.offsets[indices] - offsets[:-1], lengths) + np.arange(
            offsets[-1]
        ), offsets

    def select(self, indices: np.ndarray) -> TokenizedPairs:
        """The pairs at the given (M,) indices, in that order."""
        flat, offsets = self.flat_index(indices)
        types = None if self.token_type_ids is None else self.token_type_ids[flat]
        return TokenizedPairs(self.input_ids[flat], types, offsets, self.prompt_length)

    def without_trailing(self, token_id: int) -> TokenizedPairs:
        """The pairs without the run of this token that a pair may end in; the first token always
        stays.
        """
        lengths = self.lengths.copy()
        for n in np.flatnonzero(self.input_ids[self.offsets[1:] - 1] == token_id):
            kept = np.flatnonzero(self.input_ids[self.offsets[n] : self.offsets[n + 1]] != token_id)
            lengths[n] = kept[-1] + 1 if len(kept) else 1
        if np.array_equal(lengths, self.lengths):
            return self
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        flat = np.repeat(self.offsets[:-1] - offsets[:-1], lengths) + np.arange(offsets[-1])
        types = None if self.token_type_ids is None else self.token_type_ids[flat]
        return TokenizedPairs(self.input_ids[flat], types, offsets, self.prompt_length)

    def pad(
        self,
        indices: np.ndarray,
        *,
        pad_token_id: int,
        padding_side: str = "right",
        pad_token_type_id: int = 0,
        width: int | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """The pairs at the (B,) indices as int64 (B, width) tensors, under the model's argument
        names; width is the longest pair's where it is None.
        """
        chosen = self.select(indices)
        width = int(chosen.lengths.max(initial=0)) if width is None else width
        column = np.arange(width)
        filled = column[None, :] < chosen.lengths[:, None]
        if padding_side == "left":
            filled = filled[:, ::-1]
        columns = {"input_ids": (chosen.input_ids, pad_token_id)}
        if chosen.token_type_ids is not None:
            columns["token_type_ids"] = (chosen.token_type_ids, pad_token_type_id)
        batch = {"attention_mask": torch.from_numpy(filled.astype(np.int64))}
        for name, (values, padding) in columns.items():
            padded = np.full(filled.shape, padding, np.int64)
            padded[filled] = values
            batch[name] = torch.from_numpy(padded)
        if self.prompt_length:
            batch["prompt_length"] = torch.full((len(chosen),), self.prompt_length)
        if device is None:
            return batch
        return {name: upload(tensor, torch.device(device)) for name, tensor in batch.items()}


def upload(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Values of the host on the device; the host does not wait for a GPU to take them.

    A tensor that is there already stays what it is.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type not in ("cuda", "meta"):
        return tensor.to(device)
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# A few thousand tokens keep every matrix product of a CPU busy; more only leaves the caches.
MAX_TOKENS = 4096


def most_tokens(device: torch.device) -> int:
    """Of a forward pass: what keeps a device busy. A GPU takes many, and waits for the host with
    few.
    """
    return 65536 if device.type in ("cuda", "meta") else MAX_TOKENS


def plan_micro_batches(
    lengths: np.ndarray,
    *,
    max_pairs: int | None = None,
    max_tokens: int | None = None,
    padded: bool = False,
) -> list[np.ndarray]:
    """Cut N pairs into micro-batches, longest first, so that padding them would add little.

    Args:
        lengths: (N,) tokens of each pair.
        max_pairs: most pairs in a micro-batch; None sets no limit.
        max_tokens: most tokens in one; a pair above it makes one by itself.
        padded: count the padding up to a micro-batch's longest pair as tokens.

    Returns:
        Index arrays into lengths; together they hold every index once.
    """
    for name, limit in (("max_pairs", max_pairs), ("max_tokens", max_tokens)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be None or at least 1, got {limit}")
    order = np.argsort(-np.asarray(lengths), kind="stable")
    tokens = np.concatenate([[0], np.cumsum(np.asarray(lengths)[order])])
    plan, start = [], 0
    while start < len(order):
        end = len(order) if max_pairs is None else min(start + max_pairs, len(order))
        if max_tokens is not None:
            if padded:
                fits = start + max_tokens // max(int(lengths[order[start]]), 1)
            else:
                fits = int(np.searchsorted(tokens, tokens[start] + max_tokens, side="right")) - 1
            end = min(end, max(fits, start + 1))
        plan.append(order[start:end])
        start = end
    return plan


def row_count(at_least: int) -> int:
    """The next of a series that grows like the squares: 4, 12, 16, 28, 36, 52, 64, 84, 100, ...,
    4096.

    Of some thousand rows a few per cent are added, of few rows more, which cost little. There are
    about 60 numbers up to MAX_TOKENS.
    """
    root = math.isqrt(at_least - 1) + 1
    return -(-root * root // 4) * 4


def fill_up(
    starts: np.ndarray,  # (N + 1,) int64
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences behind those of a run of T tokens, so that tokens and sequences both have few
    numbers.

    oneDNN keeps half a megabyte for every number of rows that a weight was ever multiplied with, up
    to a thousand of them, and takes milliseconds to make it: there must not be many numbers.

    Args:
        starts: where the N sequences begin, and T; there is at least one token.

    Returns:
        The (T',) places in the run of all tokens, 0 for those that are added: copies of its first
        token. And the (N' + 1,) starts with those of the added sequences, of which there is at
        least one.
    """
    num_sequences, num_tokens = len(starts) - 1, int(starts[-1])
    # Never as many as there are tokens, nor are their ends: torch.compile would take two sizes that
    # are equal once for the same one, and compile again where they differ.
    added = row_count(num_sequences + 3) - 2 - num_sequences
    places = np.zeros(row_count(num_tokens + added), np.int64)
    places[:num_tokens] = np.arange(num_tokens)
    ends = num_tokens + np.arange(1, added + 1) * (len(places) - num_tokens) // added
    return places, np.concatenate([starts, ends])
