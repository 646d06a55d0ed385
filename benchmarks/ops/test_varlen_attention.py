"""Attention at the published shape, both ways, beside torch's SDPA: a call a sequence, and one of
all.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.ops.dtypes import DTYPES
from benchmarks.workload import marco_like_lists
from rerank_fast.ops.varlen_attention import varlen_attention

HEADS, HEAD_SIZE = 12, 32


def published_lengths() -> list[int]:
    """Tokens of the pairs of 16 lists of 3 to 10 documents, sorted as the planner does; about 92 in
    the mean.
    """
    words = [len(doc.split()) for row in marco_like_lists(16) for doc in row["docs"]]
    # The query's words and 3 special tokens.
    return sorted((count + 10 for count in words), reverse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
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
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in parts))[0].transpose(
                0, 1
            )
            for parts in zip(
                q[:, 0].split(queries), k.split(lengths), v.split(lengths), strict=True
            )
        ]
        torch.autograd.grad(torch.cat(outs), (q, kv), grad)

    name = f"attention {len(lengths)} x {sum(lengths) // len(lengths)}"
    how = "1 query" if one_query else "all"
    compare(f"{name}, {how}, {str(dtype)[6:]}, beside SDPA a pair", ours, peer, rounds=7)


LENGTHS = {
    "107 x 100": [100] * 107,
    # Log-normal, as passages are.
    "107 of 20-250": sorted(
        np.random.default_rng(0).lognormal(4.6, 0.6, 107).clip(20, 250).astype(int).tolist()
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_of_a_batch(compare, lengths, dtype):
    """Beside one SDPA call on the batch, padded to its longest sequence, as models make it."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    number, longest, tokens = len(LENGTHS[lengths]), max(LENGTHS[lengths]), sum(LENGTHS[lengths])
    inside = (
        torch.arange(longest, device=device)
        < torch.tensor(LENGTHS[lengths], device=device)[:, None]
    )
    padded = (
        torch.randn(number, longest, 3, HEADS, HEAD_SIZE, device=device).to(dtype).requires_grad_()
    )
    flat = padded.detach()[inside].requires_grad_()
    grad = torch.randn(tokens, HEADS, HEAD_SIZE, device=device).to(dtype)
    padded_grad = grad.new_zeros(number, longest, HEADS, HEAD_SIZE)
    padded_grad[inside] = grad
    ends = torch.tensor(
        np.concatenate([[0], np.cumsum(LENGTHS[lengths])]), dtype=torch.int32, device=device
    )
    mask = None if inside.all() else inside[:, None, None, :]

    def ours() -> torch.Tensor:
        q, k, v = flat.unbind(1)
        out = varlen_attention(q, k, v, ends, ends, max_seqlens=(longest, longest))
        return torch.autograd.grad(out, flat, grad)[0]

    def peer() -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in padded.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return torch.autograd.grad(out, padded, padded_grad)[0]

    if dtype == torch.float32:
        torch.testing.assert_close(ours(), peer()[inside], rtol=1e-3, atol=1e-4)
    compare(
        f"attention {lengths}, {str(dtype)[6:]}, beside SDPA of the batch", ours, peer, rounds=9
    )
