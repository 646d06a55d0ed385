"""Dropout by place, drawn as numeric.h and dropout_factors do: a hash of seed, row and column."""

from __future__ import annotations

import functools

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """A permutation of 32 bits, x uint32."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def numbers(rows, place, there):
    """What stands for the rows at some places: what `rows` holds there, or, where it is None, the
    place itself.
    """
    if rows is not None:
        place = tl.load(rows + place, mask=there, other=0)
    return place


@triton.jit
def row_streams(seed, stream, rows):
    """What the rows of one stream draw from; seed is mixed_seed()'s, rows are counted over the
    whole tensor.
    """
    start = mix(seed.to(tl.uint32) + stream.to(tl.uint32) * tl.full([], 0x9E3779B9, tl.uint32))
    return mix(start + rows.to(tl.uint32))


@triton.jit
def factors(streams, columns, threshold, rescale):
    """0 or 1 / (1 - p) for streams and columns that broadcast against each other."""
    drawn = mix(columns.to(tl.uint32) * tl.full([], 0x9E3779B9, tl.uint32) + streams)
    return tl.where(drawn < threshold.to(tl.uint32), 0.0, rescale)


@triton.jit
def tile_factors(seed, STREAM: tl.constexpr, rows, columns, threshold, rescale):
    """The factors of a tile of rows x columns of one stream."""
    streams = row_streams(seed, tl.full([], STREAM, tl.uint32), rows)
    return factors(streams[:, None], columns[None, :], threshold, rescale)


@functools.lru_cache(maxsize=256)  # backward asks for forward's
def scalars(dropout_p: float, seed: int) -> tuple[int, int, float]:
    """(seed, threshold, rescale) as the kernels take them; both numbers are 32 bits, passed as
    int32.
    """
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    threshold = int(min(dropout_p * 2**32, 2**32 - 1))
    return _signed(_mix(low ^ _mix(high))), _signed(threshold), 1 / (1 - dropout_p)


def _mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def _signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x
