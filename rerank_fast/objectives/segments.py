"""Sums, maxima, softmax and orders of ragged lists: segment operations, never padded."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rerank_fast.ops import ragged


class Segments:
    """The lists of one batch: values of documents, (N,), to values of lists, (Q,), and back.

    Nothing waits for the device, and a segment's sum does not depend on the other lists.
    """

    def __init__(
        self,
        offsets: Tensor,  # (Q + 1,) int64
        num_documents: int,
    ) -> None:
        self.offsets, self.num_documents = offsets, num_documents

    @functools.cached_property
    def sizes(self) -> Tensor:
        """(Q,) int64: documents of each list."""
        return self.offsets.diff()

    @functools.cached_property
    def of(self) -> Tensor:
        """(N,) int64: each document's list."""
        return torch.repeat_interleave(self.sizes, output_size=self.num_documents)

    def each(self, values: Tensor) -> Tensor:
        """(N,): of (Q,) values of lists the one of each document's list."""
        return values.index_select(0, self.of)

    def sum(self, values: Tensor) -> Tensor:
        """(Q,): 0 of an empty list."""
        return torch.segment_reduce(values, "sum", offsets=self.offsets, unsafe=True)

    def max(self, values: Tensor) -> Tensor:
        """(Q,): -inf of an empty list, NaN where there is one."""
        return torch.segment_reduce(values, "max", offsets=self.offsets, unsafe=True)

    def unlike_numbers(self, values: Tensor) -> Tensor:
        """(Q,): 0, and NaN where a list holds a value that is NaN or infinite."""
        return self.sum(values * 0)

    def log_softmax(self, values: Tensor) -> Tensor:
        """(N,): log(exp(value) / the sum of exp over its list)."""
        shifted = values - self.each(self.max(values))
        return shifted - self.each(self.sum(shifted.exp()).log())

    def log_sum_exp(self, values: Tensor) -> Tensor:
        """(Q,): -inf of a list without a value above -inf."""
        # Not -inf: that minus itself is NaN.
        highest = self.max(values).clamp(min=torch.finfo(values.dtype).min)
        return self.sum((values - self.each(highest)).exp()).log() + highest

    def _keys(self, values: Tensor) -> Tensor:
        """(N,) int64 that rise from list to list, and within one as (N,) fp32 values fall."""
        bits = (values.float() + 0.0).view(torch.int32)  # -0 as 0
        falling = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
        return (self.of << 32) + falling

    def order(self, values: Tensor) -> Tensor:
        """(N,) int64: documents by (N,) fp32 values, a list's highest first; ties as they came."""
        return self._keys(values).argsort(stable=True)

    def positions(self) -> Tensor:
        """(N,) int64: each document's place in its list, from 1."""
        places = torch.arange(1, self.num_documents + 1, device=self.offsets.device)
        return places - self.each(self.offsets[:-1])

    def mean_ranks(self, values: Tensor) -> Tensor:
        """(N,): ranks of (N,) fp32 values in their list, 1 for the highest; a tie has its mean."""
        if self.num_documents == 0:
            return values
        keys, order = self._keys(values).sort(stable=True)
        at = torch.arange(self.num_documents, device=keys.device)
        starts = torch.ones_like(keys, dtype=torch.bool)
        starts[1:] = keys[1:] != keys[:-1]
        ends = starts.roll(-1)
        first = at.where(starts, 0).cummax(0).values
        last = at.where(ends, self.num_documents).flip(0).cummin(0).values.flip(0)
        within = first + last - 2 * self.each(self.offsets[:-1])
        return torch.empty_like(values).index_copy_(0, order, within.to(values.dtype) / 2 + 1)


def flat(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
) -> tuple[Tensor, Tensor, Segments]:
    """Scores and labels without graph, in fp32 (fp64 for fp64 scores), and their lists.

    Raises:
        ValueError: a wrong shape, dtype or device, or offsets on the CPU that do not rise from 0
            to N.
    """
    ragged.check_lists(scores, labels, offsets)
    if offsets.is_cpu:
        ragged.check_offsets(offsets, scores.shape[0])
    dtype = torch.promote_types(scores.dtype, torch.float32)
    lists = Segments(offsets, scores.shape[0])
    return scores.detach().to(dtype), labels.detach().to(dtype), lists
