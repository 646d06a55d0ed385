"""Tokenised pairs in one flat run, and the planner that cuts them into micro-batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenizedPairs:
    """N (query, document) pairs as token ids without padding; pair n is offsets[n] to offsets[n + 1]."""

    input_ids: np.ndarray  # (T,) int32
    token_type_ids: np.ndarray | None  # (T,) int8; None where the tokenizer gives none
    offsets: np.ndarray  # (N + 1,) int64

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
            raise ValueError(f"{len(types)} of {len(parts)} parts have token_type_ids; expected all or none")
        return TokenizedPairs(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate(types) if types else None,
            np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]).astype(np.int64),
        )

    def select(self, indices: np.ndarray) -> TokenizedPairs:
        """The pairs at the given (M,) indices, in that order."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # Position of every kept token in the flat run: its pair's start plus its place in the pair.
        flat = np.repeat(self.offsets[indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        types = None if self.token_type_ids is None else self.token_type_ids[flat]
        return TokenizedPairs(self.input_ids[flat], types, offsets)

    def pad(
        self,
        indices: np.ndarray,
        *,
        pad_token_id: int,
        padding_side: str = "right",
        pad_token_type_id: int = 0,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """The pairs at the (B,) indices as int64 (B, longest) tensors, under the model's argument names."""
        chosen = self.select(indices)
        width = int(chosen.lengths.max(initial=0))
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
        if device is None or torch.device(device).type == "cpu":
            return batch
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def plan_micro_batches(lengths: np.ndarray, max_pairs: int) -> list[np.ndarray]:
    """Cut N pairs into micro-batches of at most max_pairs, longest first, so that each pads little.

    Returns index arrays into lengths; together they hold every index once.
    """
    if max_pairs < 1:
        raise ValueError(f"max_pairs must be at least 1, got {max_pairs}")
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[i : i + max_pairs] for i in range(0, len(order), max_pairs)]
