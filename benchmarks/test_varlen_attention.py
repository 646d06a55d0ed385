"""Attention at the published shape, forward and backward, beside one torch SDPA call a sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.workload import marco_like_lists
from rerank_fast.ops.varlen_attention import varlen_attention

HEADS, HEAD_SIZE = 12, 32


def published_lengths() -> list[int]:
    """Tokens of the pairs of 16 lists of 3 to 10 documents, sorted as the planner does; about 92 in the mean."""
    words = [len(doc.split()) for row in marco_like_lists(16) for doc in row["docs"]]
    return sorted((count + 10 for count in words), reverse=True)  # the query's words and 3 special tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("one_query", [False, True], ids=["all tokens", "first token only"])
def test_attention(compare, one_query, dtype):
    lengths = published_lengths()
    queries = [1] * len(lengths) if one_query else lengths
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def rows(count: int, parts: int) -> torch.Tensor:
        return torch.randn(count, parts, HEADS, HEAD_SIZE, device=device).to(dtype).requires_grad_()

    # Views of one projection, as layers have them.
    q, kv, grad = rows(sum(queries), 1), rows(sum(lengths), 2), rows(sum(queries), 1).detach()[:, 0]
    cu_q, cu_k = (
        torch.tensor(np.concatenate([[0], np.cumsum(part)]), dtype=torch.int32, device=device)
        for part in (queries, lengths)
    )

    def ours() -> None:
        k, v = kv.unbind(1)
        longest = (max(queries), max(lengths))
        out = varlen_attention(q[:, 0], k, v, cu_q, cu_k, max_seqlens=longest)
        torch.autograd.grad(out, (q, kv), grad)

    def peer() -> None:
        k, v = kv.unbind(1)
        outs = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in parts))[0].transpose(0, 1)
            for parts in zip(q[:, 0].split(queries), k.split(lengths), v.split(lengths), strict=True)
        ]
        torch.autograd.grad(torch.cat(outs), (q, kv), grad)

    name = f"attention {len(lengths)} x {sum(lengths) // len(lengths)}"
    how = "1 query" if one_query else "all"
    compare(f"{name}, {how}, {str(dtype)[6:]}, beside SDPA a pair", ours, peer, rounds=7)
