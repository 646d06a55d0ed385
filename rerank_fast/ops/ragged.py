"""Checks of lists and sequences that lie one after the other: their cumulative lengths rise from 0.

Their values are read by an op's implementation, and not by the public function, whose checks
torch.compile traces away. A GPU's are not read: that would wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_lists(scores: Tensor, labels: Tensor, offsets: Tensor) -> None:
    """Raises ValueError unless shapes, dtypes and devices go together: (N,), (N,) and (Q + 1,)."""
    if scores.dim() != 1 or not scores.dtype.is_floating_point:
        raise ValueError(
            f"scores must be a floating-point tensor of shape (N,), got {scores.dtype} "
            f"{tuple(scores.shape)}"
        )
    if labels.shape != scores.shape:
        raise ValueError(
            f"labels must have the shape of scores, {tuple(scores.shape)}, got "
            f"{tuple(labels.shape)}"
        )
    if labels.is_complex():
        raise ValueError(f"labels must be real numbers, got {labels.dtype}")
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.shape[0] < 1:
        raise ValueError(
            f"offsets must be int64 of shape (Q + 1,), got {offsets.dtype} {tuple(offsets.shape)}"
        )
    if not scores.device == labels.device == offsets.device:
        raise ValueError(
            "scores, labels and offsets must be on one device, "
            f"got {scores.device}, {labels.device} and {offsets.device}"
        )
    if offsets.shape[0] == 1 and scores.shape[0]:
        raise ValueError(f"offsets must rise from 0 to N = {scores.shape[0]}, got a single one")


def check_offsets(offsets: Tensor, num_documents: int) -> None:
    """Raises ValueError for wrong values of offsets (Q + 1,)."""
    bounds = offsets.tolist()
    if not _rise(bounds, num_documents):
        raise ValueError(f"offsets must rise from 0 to N = {num_documents}, got {_shown(bounds)}")


def check_ends(name: str, ends: Tensor, num_tokens: int) -> None:
    """Raises ValueError for wrong values of cu_seqlens (N + 1,)."""
    bounds = ends.tolist()
    if not _rise(bounds, num_tokens):
        raise ValueError(f"{name} must rise from 0 to {num_tokens} tokens, got {_shown(bounds)}")


def _rise(bounds: list[int], last: int) -> bool:
    return bounds[0] == 0 and bounds[-1] == last and bounds == sorted(bounds)


def _shown(bounds: list[int]) -> list[object]:
    return [*bounds[:4], "...", *bounds[-4:]] if len(bounds) > 8 else [*bounds]


def lists_of(offsets: Tensor, num_documents: int) -> Tensor:
    """(N,) int64: each document's list; one of the Q whatever the offsets (Q + 1,) say."""
    documents = torch.arange(num_documents, device=offsets.device)
    found = torch.searchsorted(offsets, documents, right=True) - 1
    return found.clamp(min=0, max=offsets.shape[0] - 2)
