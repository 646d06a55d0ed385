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

    slots: Tensor  # (2 * reach + 1,) int32
    query_positions: Tensor | None  # (N,) int32, of the one token that is computed of each
    factors: Tensor | None  # (R, H) of the dropout of the embeddings; None: there is none


class RelativeStep:
    """A layer's RelativeTerms with their products' weights ready."""

    def __init__(
        self,
        terms: RelativeTerms,
        num_heads: int,
        dtype: torch.dtype,
        copies: NarrowCopies | None,
    ) -> None:
        self.terms, self.num_heads, self.dtype = terms, num_heads, dtype
        self.key, self.query = (
            None if module is None else StepLinear([module], dtype, 0, copies=copies)
            for module in (terms.key, terms.query)
        )
        self.linears = [one for one in (self.key, self.query) if one is not None]

    @property
    def dropout_p(self) -> float:
        """Of the embeddings."""
        dropout = self.terms.dropout
        return float(dropout.p) if dropout is not None and dropout.training else 0.0

    def prepare(self, first_of: int | None, seed: int) -> RelativeBatch:
        """Of one micro-batch.

        Args:
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
        return RelativeBatch(self.terms.slots(device), positions, factors)

    def __call__(self, batch: RelativeBatch) -> RelativePositions:
        """As attention takes them."""
        wide = torch.promote_types(self.dtype, torch.float32)
        rows = self.terms.embeddings.weight.to(wide)
        if self.key is None and self.query is None:
            return RelativePositions(batch.slots, None, None, rows, batch.query_positions)
        if self.terms.norm is not None:
            rows = norm(rows, self.terms.norm)
        if batch.factors is not None:
            rows = rows * batch.factors
        rows = rows.to(self.dtype)
        keys, queries = (
            None if one is None else one(rows).view(len(rows), self.num_heads, -1)
            for one in (self.key, self.query)
        )
        return RelativePositions(batch.slots, keys, queries, None, batch.query_positions)
