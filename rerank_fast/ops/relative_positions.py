"""What attention's scores get from the distance of a query and a key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RelativePositions:
    """Terms of varlen_attention's scores that follow from the distance of a query and a key.

    The distance is i - j, of the place of the query in its sequence and that of the key. A table
    gives each a slot, one of R; what is farther off than `reach` has the slot of reach. With the
    op's scale the score of query i and key j in a head becomes

        scale * (q_i . k_j + q_i . keys[slot, head] + k_j . queries[slot, head]) + bias[slot, head]

    DeBERTa has the first two (content to position, and position to content), MPNet and T5 the bias.

    Attributes:
        slots: (2 * reach + 1,) int32: the slot of distance d, from 0 to R - 1, stands at
            d + reach. On the CPU another number raises ValueError; on a GPU, where none is waited
            for, it reads nothing outside of the tables, and results mean nothing.
        keys: (R, heads, head_size) in q's dtype, or None.
        queries: (R, heads, head_size) in q's dtype, or None.
        bias: (R, heads) fp32, or fp64 where q is; or None.
        query_positions: (Tq,) int32 places of the queries in their sequences, where they are others
            than i + Lk - Lq for query i of Lq, which puts the last query beside the last key: 0
            for the first token of each sequence, computed alone.
    """

    slots: Tensor
    keys: Tensor | None = None
    queries: Tensor | None = None
    bias: Tensor | None = None
    query_positions: Tensor | None = None

    @property
    def reach(self) -> int:
        """The distance from which on all have one slot."""
        return self.slots.shape[0] // 2

    @property
    def num_slots(self) -> int:
        """R."""
        known = self.keys if self.keys is not None else self.queries
        table = known if known is not None else self.bias
        assert table is not None
        return table.shape[0]

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Slots, keys, queries, bias and the queries' positions: as an op takes them."""
        return self.slots, self.keys, self.queries, self.bias, self.query_positions

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raises ValueError unless these belong to (Tq, heads, head_size) queries and (Tk, heads,
        head_size) keys.
        """
        if k.shape[1] != q.shape[1]:
            raise ValueError(
                "relative positions need as many heads of keys as of queries, "
                f"got {k.shape[1]} and {q.shape[1]}"
            )
        if self.keys is None and self.queries is None and self.bias is None:
            raise ValueError("relative must have keys, queries or bias, got none of them")
        _check_one("relative.slots", self.slots, torch.int32, self.slots.shape[:1], q)
        if self.slots.shape[0] % 2 == 0:
            raise ValueError(
                "relative.slots must have shape (2 * reach + 1,), an odd number, "
                f"got {tuple(self.slots.shape)}"
            )
        rows = (self.num_slots, *q.shape[1:])
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        for name, tensor, dtype, shape in (
            ("keys", self.keys, q.dtype, rows),
            ("queries", self.queries, q.dtype, rows),
            ("bias", self.bias, wide, rows[:2]),
            ("query_positions", self.query_positions, torch.int32, q.shape[:1]),
        ):
            if tensor is not None:
                _check_one(f"relative.{name}", tensor, dtype, shape, q)
        if self.num_slots == 0:
            raise ValueError("relative must have at least one slot, got tables of none")

    def check_slots(self) -> None:
        """Raises ValueError unless every slot is in the tables; waits for a device."""
        lowest, highest = int(self.slots.min()), int(self.slots.max())
        if not 0 <= lowest <= highest < self.num_slots:
            raise ValueError(
                f"relative.slots must be from 0 to {self.num_slots - 1}, got {lowest} to {highest}"
            )


def _check_one(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], q: Tensor
) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape) or tensor.device != q.device:
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(shape)} on {q.device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
