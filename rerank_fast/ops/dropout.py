"""The specification of dropout: what is dropped follows from a seed and a place by a counter.

No generator has a state, so that backward draws again what forward drew, some rows of many computed
alone lose what they lost among all, and every backend drops the same elements: csrc/common's
numeric.h and triton/dropout.py compute this hash.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32 bits, held in int64: three xor-shifts between two multiplications."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def dropout_factors(seed: int, stream: int, rows: Tensor, num_columns: int, p: float) -> Tensor:
    """(R, num_columns) factors, 0 or 1 / (1 - p), of the (R,) rows of one stream, in fp64, or in
    fp32 on devices that may have none, as Apple's and Intel's GPUs.

    They follow from seed, stream, row and column alone, by a hash of 32 bits: every backend draws
    the same.
    """
    low, high = (
        torch.tensor(part, dtype=torch.int64, device=rows.device) for part in (seed, seed >> 32)
    )
    start = _mix((low & 0xFFFFFFFF) ^ _mix(high & 0xFFFFFFFF))
    row = _mix((_mix((start + stream * 0x9E3779B9) & 0xFFFFFFFF) + rows.long()) & 0xFFFFFFFF)
    column = (torch.arange(num_columns, device=rows.device) * 0x9E3779B9) & 0xFFFFFFFF
    drawn = _mix((column[None, :] + row[:, None]) & 0xFFFFFFFF)
    threshold = int(min(p * 2**32, 2**32 - 1))
    wide = torch.float64 if rows.device.type in ("cpu", "cuda", "meta") else torch.float32
    return (drawn >= threshold).to(wide) / (1 - p)


def check_rows(rows: Tensor | None, x: Tensor) -> None:
    """Raises ValueError unless rows, where given, can stand for those of x in its dropout."""
    if rows is None:
        return
    if rows.dtype != torch.int32 or rows.shape != x.shape[:1] or rows.device != x.device:
        raise ValueError(
            f"rows must be int32 of shape ({x.shape[0]},) on {x.device}, "
            f"got {rows.dtype} {tuple(rows.shape)} on {rows.device}"
        )
