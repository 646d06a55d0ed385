"""What layers of every kind read of a micro-batch, and what they share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from rerank_fast.ops.int8_linear import Int8Rows

if TYPE_CHECKING:
    from rerank_fast.model.packed.post_norm_step import PostNormStep
    from rerank_fast.model.packed.pre_norm_step import PreNormStep
    from rerank_fast.model.packed.relative import RelativeBatch

Rows: TypeAlias = Tensor | Int8Rows


@dataclass(frozen=True)
class MicroBatch:
    """Where the N sequences of a flat run of T tokens begin and end, and which token of each is
    read.
    """

    cu_seqlens: Tensor  # (N + 1,) int32
    one_each: Tensor  # (N + 1,) int32: 0, 1, ..., N
    read: Tensor  # (N,) int64
    # Cosines and sines (T, head size), by the name that layers give.
    rotary: dict[str, tuple[Tensor, Tensor]]
    # (N,) tokens of each, on the host: shapes there follow without asking the device.
    lengths: np.ndarray
    # Where it is part of a larger one whose dropout it has: the places of its tokens and its
    # sequences there.
    token_rows: Tensor | None = None  # (T,) int32
    sequence_rows: Tensor | None = None  # (N,) int32
    reads_last: bool = False  # the token that is read is the last of each
    captured: bool = False  # for other values too: lengths are the most that they could be

    @functools.cached_property
    def longest(self) -> int:
        """Most tokens of a sequence."""
        return int(self.lengths.max(initial=0))


@dataclass(frozen=True)
class EncodedBatch:
    """What a decoder's layer reads beside its own rows."""

    states: Tensor  # (T, H) of the encoder
    cu_seqlens: Tensor  # (N + 1,) int32
    longest: int  # most tokens of a sequence


@dataclass(frozen=True)
class LayerBatch:
    """What one layer reads of a micro-batch, made on the host: torch.compile traces what takes it.

    Only what the layer needs: an unread tensor of one sequence would be another shape to compile
    for.
    """

    cu_queries: Tensor  # (N + 1,) int32
    cu_keys: Tensor  # (N + 1,) int32
    # Most queries and keys of a sequence; None where the host can't say.
    max_seqlens: tuple[int, int] | None
    seeds: tuple[int, ...]  # of each dropout that an op does itself
    read: Tensor | None = None  # (N,) int64: the tokens that go on; None: all
    kept: Tensor | None = None  # int64: the tokens that they may attend to; None: all
    rotary: tuple[Tensor, Tensor] | None = None
    rows: Tensor | None = (
        None  # int32: the numbers in the dropout of the tokens that go on; None: their places
    )
    relative: RelativeBatch | None = None
    encoded: EncodedBatch | None = None


def run_layer(
    layer: PostNormStep | PreNormStep, wide: Tensor, x: Rows | None, batch: LayerBatch
) -> tuple[Tensor, Rows | None]:
    """(T, H) results of a layer: the residual stream, and what products read of it or what is to be
    added to it.
    """
    return layer(wide, x, batch)  # type: ignore[arg-type]


def prepare_layers(
    layers: Sequence[PostNormStep | PreNormStep], batch: MicroBatch
) -> list[LayerBatch]:
    """What each of them reads of a micro-batch; the seeds of all are drawn at once."""
    shares = [layer.dropouts() for layer in layers]
    seeds = iter(_draw_seeds([p for one in shares for p in one]))
    return [
        layer.prepare(batch, [next(seeds) for _ in one])
        for layer, one in zip(layers, shares, strict=True)
    ]


def layer_batch_of(batch: MicroBatch, seeds: list[int], *, one_token: bool) -> LayerBatch:
    longest, ends = batch.longest, batch.cu_seqlens
    if one_token:
        most = None if batch.captured else (1, longest)
        return LayerBatch(
            batch.one_each, ends, most, tuple(seeds), batch.read, rows=batch.sequence_rows
        )
    most = None if batch.captured else (longest, longest)
    return LayerBatch(ends, ends, most, tuple(seeds), rows=batch.token_rows)


def share_of(module: nn.Module | None, p: float | None = None) -> float:
    """Of a dropout that an op does itself; p is the module's own where it is a Dropout."""
    if module is None or not module.training:
        return 0.0
    return float(module.p) if isinstance(module, nn.Dropout) else p or 0.0


def _draw_seeds(shares: list[float]) -> list[int]:
    """For such dropouts, from torch's generator of the host, so that a saved state repeats them; 0
    for one of 0.
    """
    drawn = iter(
        torch.randint(2**62, (count,)).tolist() if (count := sum(p > 0 for p in shares)) else ()
    )
    return [next(drawn) if p > 0 else 0 for p in shares]


def dropped(x: Tensor, dropout: nn.Module | None) -> Tensor:
    return x if dropout is None else dropout(x)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, heads, head size) with rotary positions of (T, head size), in x's dtype, computed in
    fp32: a head's halves are pairs of coordinates.
    """
    dtype = x.dtype
    cos, sin = cos[:, None], sin[:, None]
    if x.is_cpu and not torch.is_grad_enabled():  # in half as many passes over memory
        x, half = x.to(cos.dtype), x.shape[2] // 2
        turned = x * cos
        turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return turned.to(dtype)
    left, right = x.to(cos.dtype).chunk(2, dim=2)
    turned = x * cos + torch.cat([-right, left], dim=2) * sin
    return turned.to(dtype)
