"""What programs of attention kernels find, load and store: the block of tokens that each owns, and
tiles of one head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def block_of(
    own,  # (N + 1,) cumulative lengths of the side that the program owns a block of
    other,  # and those of the other side
    before,  # how far back from its own place a token meets the other side's, and how far on
    after,
    num_sequences,
    num_steps,
    num_own,  # tokens of either side
    num_other,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The block of program 0's axis: its first row in its sequence, and of either side length and
    first token.

    Then the range of the other side's rows that the block's may meet; places are counted from the
    sequences' ends. Last whether the sequence lies in the tokens of either side. Where it does not,
    the other side's numbers are not to be used, and its own are of what of it lies there; the first
    and the last sequence then reach to the ends.
    """
    block = tl.program_id(0)
    low = block * 0
    high = low + num_sequences - 1
    for _ in range(num_steps):
        middle = (low + high + 1) // 2
        begins = tl.load(own + middle) // BLOCK + middle <= block
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    token = tl.load(own + low)
    end_token = tl.load(own + low + 1)
    other_token = tl.load(other + low)
    other_end_token = tl.load(other + low + 1)
    fits = (token >= 0) & (token <= end_token) & (end_token <= num_own)
    fits = (
        fits
        & (other_token >= 0)
        & (other_token <= other_end_token)
        & (other_end_token <= num_other)
    )
    is_first = low == 0
    is_last = low == num_sequences - 1
    fits = fits & ((is_first == 0) | ((token == 0) & (other_token == 0)))
    fits = fits & ((is_last == 0) | ((end_token == num_own) & (other_end_token == num_other)))
    if fits == 0:
        token = tl.where(is_first, 0, tl.minimum(tl.maximum(token, 0), num_own))
        end_token = tl.where(is_last, num_own, tl.minimum(end_token, num_own))
    size = end_token - token
    first = tl.maximum(block - token // BLOCK - low, 0) * BLOCK
    other_size = other_end_token - other_token
    shift = other_size - size
    begin = first * 0
    end = other_size
    if HAS_BEFORE:
        begin = tl.maximum(begin, first + shift - before)
    if HAS_AFTER:
        end = tl.minimum(end, tl.minimum(first + BLOCK, size) + shift + after)
    return first, size, token, other_size, other_token, begin, end, fits


@triton.jit
def _places(
    token_stride, head_stride, head, token, in_rows, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """Where a (BLOCK, WIDTH) tile of one head begins, its elements from there, and which of them
    there are.
    """
    start = token.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    # A tile's own places fit 32 bits.
    places = tl.arange(0, in_rows.shape[0])[:, None] * token_stride + tl.arange(0, WIDTH)[None, :]
    there = in_rows[:, None]
    if HEAD_SIZE != WIDTH:
        there = there & (tl.arange(0, WIDTH) < HEAD_SIZE)[None, :]
    return start, places, there


@triton.jit
def load_tile(
    tensor,
    token_stride,
    head_stride,
    head,
    token,  # the tile's first
    in_rows,  # (BLOCK,)
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A (BLOCK, WIDTH) tile of one head; 0 where nothing is."""
    start, places, there = _places(
        token_stride, head_stride, head, token, in_rows, HEAD_SIZE, WIDTH
    )
    return tl.load(tensor + start + places, mask=there, other=0.0)


@triton.jit
def store_tile(
    tensor,
    tile,
    token_stride,
    head_stride,
    head,
    token,
    in_rows,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    start, places, there = _places(
        token_stride, head_stride, head, token, in_rows, HEAD_SIZE, WIDTH
    )
    tl.store(tensor + start + places, tile.to(tensor.dtype.element_ty), mask=there)


@triton.jit
def reads(
    place,  # of the queries, counted as the keys
    j,
    num_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Which queries read which keys: shapes that broadcast to the tile's."""
    allowed = j < num_k
    if HAS_LEFT:
        allowed = allowed & (j >= place - window_left)
    if HAS_RIGHT:
        allowed = allowed & (j <= place + window_right)
    return allowed


def strides(*tensors: Tensor) -> list[int]:
    found: list[int] = []
    for tensor in tensors:
        found += tensor.stride()[:2]
    return found


def has_few(q: Tensor, num_sequences: int) -> bool:
    """Whether a sequence has so few queries, on average, that a block of them is a small one."""
    return q.shape[0] <= 16 * num_sequences
