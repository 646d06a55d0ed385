"""Tensors laid out as kernels read them."""

from __future__ import annotations

from torch import Tensor


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each as one run of memory; None stays."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Each row, along the last dimension, as one run of memory; rows may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
