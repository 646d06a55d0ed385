"""The score head, forward and backward, against the eager modules: gather, pooler, dropout,
classifier.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.ops.dtypes import DTYPES
from rerank_fast.ops.score_head import score_head

HIDDEN, TOKENS = 384, 100  # of MiniLM; of a pair


@pytest.mark.parametrize("dropout", [0.1, 0.0], ids=["dropout", "no-dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("num_pairs", [100, 1000])
@pytest.mark.parametrize("gathered", [True, False], ids=["rows", "flat"])
def test_score_head(compare, num_pairs, dtype, dropout, gathered):
    """rows: of tokens that are gathered already, as packed execution calls it; flat: out of all
    hidden states.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokens = num_pairs * (1 if gathered else TOKENS)
    hidden = torch.randn(tokens, HIDDEN, device=device, dtype=dtype).requires_grad_()
    index = None if gathered else torch.arange(num_pairs, device=device) * TOKENS
    pooler, out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1)
    head = nn.Sequential(pooler, nn.Tanh(), nn.Dropout(dropout), out).to(device, dtype).train()
    leaves = [hidden, *head.parameters()]
    upstream = torch.randn(num_pairs, device=device)

    def backward(scores):
        for leaf in leaves:
            leaf.grad = None
        scores.backward(upstream)
        return [leaf.grad for leaf in leaves]

    def ours():
        weights = (pooler.weight, pooler.bias, out.weight, out.bias)
        return backward(
            score_head(hidden, index, *weights, dropout_p=dropout, training=True, seed=1)
        )

    def peer():
        rows = hidden if index is None else hidden[index]
        return backward(head(rows).squeeze(1).float())

    if dropout == 0:
        for mine, theirs in zip(ours(), peer(), strict=True):
            torch.testing.assert_close(
                mine, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())
            )
    read = "rows" if gathered else f"pairs of {TOKENS} tokens"
    case = f"score head, {num_pairs} {read}, {str(dtype)[6:]}"
    repeats = 20 if num_pairs == 100 else 5
    compare(f"{case}, dropout {dropout}", ours, peer, rounds=15, repeats=repeats if gathered else 2)
