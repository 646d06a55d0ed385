"""What a layer's scores get from the distance of query and key, made ready for one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rerank_fast.model.packed.architectures.views import RelativeTerms
from rerank_fast.model.packed.linear import NarrowCopies, StepLinear
from rerank_fast.model.packed.norm import norm
from rerank_fast.ops.relative_positions import RelativePositions


@dataclass(frozen=True)
class RelativeBatch:
    """What a layer's relative positions read of a micro-batch, made on the host."""

    slots: Tensor  # (2 * reach + 1,) int32, among the embeddings' rows or those below
    rows: tuple[int, int] | None  # the first of the embeddings that is read, and behind the last
    query_positions: Tensor | None  # (N,) int32, of the one token that is computed of each
    factors: Tensor | None  # (R, H) of the dropout of the embeddings; None: there is none


class RelativeStep:
    """A layer's RelativeTerms with their products' weights ready.

    on_host: runs eagerly on a CPU. There only embeddings that some distance names are projected,
    and where the step is made without gradients, once for all of its micro-batches.
    """

    def __init__(
        self,
        terms: RelativeTerms,
        num_heads: int,
        dtype: torch.dtype,
        copies: NarrowCopies | None,
        *,
        on_host: bool = False,
    ) -> None:
        self.terms, self.num_heads, self.dtype = terms, num_heads, dtype
        self.key, self.query = (
            None if module is None else StepLinear([module], dtype, 0, copies=copies)
            for module in (terms.key, terms.query)
        )
        self.linears = [one for one in (self.key, self.query) if one is not None]
        self._on_host = on_host and bool(self.linears)
        # Not in training, whose steps keep this one while the weights move, and whose cache goes
        # through a micro-batch first without gradients.
        self._shares = self._on_host and not torch.is_grad_enabled()
        # The keys and queries of an earlier micro-batch, and which rows they are of.
        self._shared: tuple[tuple[int, int], list[Tensor | None]] | None = None

    @property
    def dropout_p(self) -> float:
        """Of the embeddings."""
        dropout = self.terms.dropout
        return float(dropout.p) if dropout is not None and dropout.training else 0.0

    def prepare(self, longest: int, first_of: int | None, seed: int) -> RelativeBatch:
        """Of one micro-batch.

        Args:
            longest: most tokens of a sequence.
            first_of: where only the first token of each sequence is computed, the number of
                sequences.
            seed: of the embeddings' dropout, which is one for all sequences.
        """
        embeddings = self.terms.embeddings.weight
        device, p, factors = embeddings.device, self.dropout_p, None
        if p > 0:
            # A generator of its own: the state of torch's stays what it is without dropout.
            generator = torch.Generator(device).manual_seed(seed)
            drawn = torch.rand(embeddings.shape, generator=generator, device=device)
            factors = (drawn >= p) / (1 - p)
        positions = None
        if first_of is not None:
            positions = torch.zeros(first_of, dtype=torch.int32, device=device)
        slots, rows = self.terms.slots(device), None
        if self._on_host:
            slots, rows = _slots_within(slots, longest)
        return RelativeBatch(slots, rows, positions, factors)

    def __call__(self, batch: RelativeBatch) -> RelativePositions:
        """As attention takes them."""
        if not self.linears:
            wide = torch.promote_types(self.dtype, torch.float32)
            bias = self.terms.embeddings.weight.to(wide)
            return RelativePositions(batch.slots, None, None, bias, batch.query_positions)
        keys, queries = self._tables(batch)
        return RelativePositions(batch.slots, keys, queries, None, batch.query_positions)

    def _tables(self, batch: RelativeBatch) -> list[Tensor | None]:
        """(R, heads, head size) keys and queries of the rows that the batch reads."""
        if batch.rows is not None and self._shared is not None:
            (first, last), tables = self._shared
            start, end = batch.rows[0] - first, batch.rows[1] - first
            if start >= 0 and end <= last - first:
                return [None if one is None else one[start:end] for one in tables]
        embeddings = self.terms.embeddings.weight
        if batch.rows is not None:
            embeddings = embeddings[slice(*batch.rows)]
        rows = embeddings.to(torch.promote_types(self.dtype, torch.float32))
        if self.terms.norm is not None:
            rows = norm(rows, self.terms.norm)
        if batch.factors is not None:
            factors = batch.factors
            rows = rows * (factors if batch.rows is None else factors[slice(*batch.rows)])
        rows = rows.to(self.dtype)
        tables = [
            None if one is None else one(rows).view(len(rows), self.num_heads, -1)
            for one in (self.key, self.query)
        ]
        if self._shares and batch.rows is not None and batch.factors is None:
            self._shared = batch.rows, tables
        return tables


# oneDNN keeps room for every number of rows that a weight was multiplied with: there must be few.
_LENGTH_STEP = 64


def _slots_within(slots: Tensor, longest: int) -> tuple[Tensor, tuple[int, int]]:
    """The slots of the distances in sequences of so many tokens, or some more, counted from the
    first that is there; and this one with the one behind the last.
    """
    reach = len(slots) // 2
    farthest = min(reach, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)
    near = slots[reach - farthest : reach + farthest + 1]
    first, last = int(near.min()), int(near.max()) + 1
    return near - first, (first, last)
