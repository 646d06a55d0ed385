"""Checks of flat lists: scores (N,) and labels (N,) of all documents, list after list, and offsets (Q + 1,)."""

from __future__ import annotations

import torch
from torch import Tensor


def check_lists(scores: Tensor, labels: Tensor, offsets: Tensor) -> None:
    """Raises ValueError for shapes, dtypes and devices that don't go together."""
    if scores.dim() != 1 or not scores.dtype.is_floating_point:
        raise ValueError(
            f"scores must be a floating-point tensor of shape (N,), got {scores.dtype} {tuple(scores.shape)}"
        )
    if labels.shape != scores.shape:
        raise ValueError(f"labels must have the shape of scores, {tuple(scores.shape)}, got {tuple(labels.shape)}")
    if labels.is_complex():
        raise ValueError(f"labels must be real numbers, got {labels.dtype}")
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be int64 of shape (Q + 1,), got {offsets.dtype} {tuple(offsets.shape)}")
    if not scores.device == labels.device == offsets.device:
        raise ValueError(
            "scores, labels and offsets must be on one device, "
            f"got {scores.device}, {labels.device} and {offsets.device}"
        )


def check_bounds(offsets: Tensor, num_documents: int) -> None:
    """Raises ValueError for wrong values of offsets on the CPU: reading a GPU's would wait for it."""
    if not offsets.is_cpu or torch.compiler.is_compiling():
        if offsets.shape[0] == 1 and num_documents:  # told by the shapes alone
            raise ValueError(f"offsets must rise from 0 to N = {num_documents}, got a single one")
        return
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != num_documents or bounds != sorted(bounds):
        raise offsets_error(offsets, num_documents)


def offsets_error(offsets: Tensor, num_documents: int) -> ValueError:
    """What is wrong with offsets (Q + 1,) whose values are at fault."""
    bounds = offsets.tolist()
    shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-4:]]
    return ValueError(f"offsets must rise from 0 to N = {num_documents}, got {shown}")


def check_k(k: int | None) -> None:
    """Raises ValueError for a cut that is negative or no whole number."""
    if k is not None and (isinstance(k, float) or k < 0):
        raise ValueError(f"k must be None or a whole number of at least 0, got {k}")
