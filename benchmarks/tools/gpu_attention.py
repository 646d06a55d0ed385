"""A layer's attention by its backend, as a GPU's step is modelled: launches, bytes, arithmetic.

This package's kernels and PyTorch's over padded sequences are counted on meta tensors.
FlashAttention's cannot run there; what they do follows from their source (version 2, varlen): one
kernel forward; backward one for the products of result and gradient, which also clears the queries'
gradient in fp32, one for the gradients, which adds to that (in the card's cache, as is assumed),
and one that rounds it. All see whole sequences, in bf16 and without dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tools import gpu_workloads
from benchmarks.tools.gpu_counts import CARDS, Operation, Tally, counting
from rerank_fast.ops.varlen_attention import varlen_attention


@dataclass(frozen=True)
class Heads:
    """Of a layer, and the (N,) tokens of the sequences that it reads."""

    queries: int
    keys: int
    size: int
    lengths: np.ndarray

    @staticmethod
    def of(shape: str) -> Heads:
        config = gpu_workloads.config_of(shape)
        heads = config.num_attention_heads
        return Heads(
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            gpu_workloads.training_lists(config.vocab_size).pairs.lengths,
        )

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


def _rows(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def packed(heads: Heads) -> dict[str, Tally]:
    """This package's kernels."""
    query = _rows(heads.tokens, heads.queries, heads.size)
    key, value = (_rows(heads.tokens, heads.keys, heads.size) for _ in range(2))
    ends = torch.empty(len(heads.lengths) + 1, dtype=torch.int32, device="meta")
    with counting(heads.lengths) as counts:
        counts.begin("forward")
        out = varlen_attention(query, key, value, ends, ends)
        counts.begin("backward")
        out.backward(torch.empty_like(out))
    return counts.phases


def padded(heads: Heads) -> dict[str, Tally]:
    """PyTorch's, of all sequences as long as the longest, with a mask."""
    count, longest = len(heads.lengths), int(heads.lengths.max())
    query, key, value = (_rows(count, heads.queries, longest, heads.size) for _ in range(3))
    mask = torch.ones(count, 1, 1, longest, dtype=torch.bool, device="meta")
    with counting(heads.lengths) as counts:
        counts.begin("forward")
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        counts.begin("backward")
        out.backward(torch.empty_like(out))
    return counts.phases


def flash(heads: Heads) -> dict[str, Tally]:
    """FlashAttention's, by its source."""
    queries = heads.tokens * heads.queries * heads.size
    keys = heads.tokens * heads.keys * heads.size
    sums = 4 * heads.tokens * heads.queries  # of a row of scores
    pairs = heads.queries * heads.size * int((heads.lengths.astype(np.int64) ** 2).sum())
    added = 2 * 4 * queries  # read and written
    return {
        "forward": Tally([Operation("forward", 1, 4 * queries + 4 * keys + sums, 4 * pairs)]),
        "backward": Tally(
            [
                Operation("products of rows", 1, 2 * 2 * queries + sums + 4 * queries),
                Operation(
                    "gradients", 1, 2 * 2 * queries + 8 * keys + 2 * sums + added, 10 * pairs
                ),
                Operation("rounding", 1, 4 * queries + 2 * queries),
            ]
        ),
    }


BACKENDS = {"Triton, packed": packed, "FlashAttention 2, packed": flash, "PyTorch, padded": padded}


def table() -> list[str]:
    """Markdown: a row for each shape and backend."""
    card = CARDS[0]
    lines = [
        "## Attention of a layer",
        "",
        f"104 pairs, forward and backward; milliseconds of an {card.name} as modelled.",
        "",
        "|  | backend | launches | GB | TFLOP | forward, ms | backward, ms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for shape in gpu_workloads.SHAPES:
        heads = Heads.of(shape)
        for name, count in BACKENDS.items():
            phases = count(heads)
            launches, size, flops = (
                sum(getattr(one, key) for one in phases.values())
                for key in ("launches", "bytes", "flops")
            )
            times = [f"{1e3 * phases[one].seconds(card):.3f}" for one in ("forward", "backward")]
            cells = [shape, name, str(launches), f"{size / 1e9:.3f}", f"{flops / 1e12:.4f}", *times]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
