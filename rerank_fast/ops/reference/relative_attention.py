"""The specification of relative positions in attention's scores: eager, of one sequence, any
dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rerank_fast.ops.relative_positions import RelativePositions


def slots_of(relative: RelativePositions, own: slice, num_k: int) -> Tensor:
    """(num_q, num_k) int64: the slot of every query of one sequence, those of `own` of all, and
    key.
    """
    device, num_q = relative.slots.device, own.stop - own.start
    places = torch.arange(num_q, device=device) + num_k - num_q
    if relative.query_positions is not None:
        places = relative.query_positions[own].long()
    distance = places[:, None] - torch.arange(num_k, device=device)[None, :]
    return relative.slots[distance.clamp(-relative.reach, relative.reach) + relative.reach].long()


def relative_scores(
    queries: Tensor,  # (heads, num_q, head_size)
    keys: Tensor,  # (heads, num_k, head_size)
    relative: RelativePositions,
    own: slice,
    scale: float,
) -> Tensor:
    """(heads, num_q, num_k) that relative positions add to the scores of one sequence."""
    slots = slots_of(relative, own, keys.shape[1])
    index = slots.expand(queries.shape[0], -1, -1)
    total = torch.zeros(index.shape, dtype=queries.dtype, device=queries.device)
    if relative.keys is not None:
        by_slot = queries @ relative.keys.to(queries.dtype).permute(1, 2, 0)
        total = total + scale * by_slot.gather(2, index)
    if relative.queries is not None:
        by_slot = keys @ relative.queries.to(keys.dtype).permute(1, 2, 0)
        total = total + scale * by_slot.gather(2, index.transpose(1, 2)).transpose(1, 2)
    if relative.bias is not None:
        total = total + relative.bias.to(total.dtype).t()[:, slots]
    return total


class RelativeGradients:
    """The gradients of a RelativePositions, summed over the sequences in their order.

    On a GPU their sums are in no fixed order, unless torch.use_deterministic_algorithms is on.
    """

    def __init__(self, relative: RelativePositions, wide: torch.dtype) -> None:
        self._relative = relative
        self._sums = [
            None if one is None else torch.zeros(one.shape, dtype=wide, device=one.device)
            for one in (relative.keys, relative.queries, relative.bias)
        ]

    def add(
        self, queries: Tensor, keys: Tensor, d_scores: Tensor, own: slice, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Take up one sequence's (heads, num_q, num_k) gradient of scores; what its queries and
        keys get through the terms.
        """
        relative = self._relative
        d_keys, d_queries, d_bias = self._sums
        slots = slots_of(relative, own, keys.shape[1])
        index = slots.expand(queries.shape[0], -1, -1)
        to_queries, to_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        if relative.keys is not None and d_keys is not None:
            by_slot = scale * self._by_slot(d_scores, index)  # (heads, num_q, R)
            to_queries = by_slot @ relative.keys.to(queries.dtype).transpose(0, 1)
            d_keys += (by_slot.transpose(1, 2) @ queries).transpose(0, 1)
        if relative.queries is not None and d_queries is not None:
            by_slot = scale * self._by_slot(d_scores.transpose(1, 2), index.transpose(1, 2))
            to_keys = by_slot @ relative.queries.to(keys.dtype).transpose(0, 1)
            d_queries += (by_slot.transpose(1, 2) @ keys).transpose(0, 1)
        if d_bias is not None:
            d_bias += self._by_slot(d_scores, index).sum(dim=1).t()
        return to_queries, to_keys

    def _by_slot(self, d_scores: Tensor, index: Tensor) -> Tensor:
        """Sums of the last dimension over what has one slot."""
        sums = d_scores.new_zeros(*d_scores.shape[:2], self._relative.num_slots)
        return sums.scatter_add(2, index, d_scores)

    def all(self) -> list[Tensor | None]:
        """Of keys, queries and bias, in their dtypes; None for what there is not."""
        relative = self._relative
        return [
            None if total is None or own is None else total.to(own.dtype)
            for total, own in zip(
                self._sums, (relative.keys, relative.queries, relative.bias), strict=True
            )
        ]
