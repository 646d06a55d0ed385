"""The Triton kernels, forward and backward, at sizes that no block divides. For the sanitizer.

python -m benchmarks.tools.gpu_parts.odd_shapes
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops.approx_ranks import approx_ranks
from rerank_fast.ops.lambda_loss import lambda_loss
from rerank_fast.ops.ndcg import ndcg
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.score_head import score_head
from rerank_fast.ops.varlen_attention import varlen_attention


def _ends(lengths: Sequence[int], device: str, dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


def attention(
    device: str, dtype: torch.dtype, lengths: Sequence[int], sizes: Sequence[int]
) -> None:
    ends, total = _ends(lengths, device, torch.int32), sum(lengths)
    options = ({"dropout_p": 0.1, "seed": 3}, {"causal": True}, {"window": (7, 3)})
    for size, kv_heads, option in zip(sizes, (2, 1, 1), options, strict=False):
        q, k, v = (
            torch.randn(total, heads, size, device=device, dtype=dtype, requires_grad=True)
            for heads in (2, kv_heads, kv_heads)
        )
        out = varlen_attention(q, k, v, ends, ends, backend="triton", **option)
        out.backward(torch.ones_like(out))


def norms_and_heads(device: str, dtype: torch.dtype, rows: int, widths: Sequence[int]) -> None:
    for width in widths:
        x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
        stream = torch.randn(rows, width, device=device, requires_grad=True)
        weight, bias = (torch.randn(width, device=device, requires_grad=True) for _ in range(2))
        wide, narrow = residual_norm(
            x, stream, weight, bias, eps=1e-12, dropout_p=0.1, seed=1, backend="triton"
        )
        (wide.sum() + narrow.float().sum()).backward()
        dense = torch.randn(width, width, device=device, requires_grad=True)
        out = torch.randn(1, width, device=device, requires_grad=True)
        first = torch.tensor([0, 3, rows - 1], dtype=torch.int32, device=device)
        score_head(
            stream,
            first,
            dense,
            bias,
            out,
            None,
            dropout_p=0.1,
            training=True,
            seed=2,
            backend="triton",
        ).sum().backward()


def vector_gradients(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    """What a layer's function launches besides."""
    from rerank_fast.ops.triton.column_sums import column_sums
    from rerank_fast.ops.triton.gelu import LAUNCH, gelu_grad

    x, grad = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    sums = torch.empty(-(-rows // LAUNCH["ROWS"]), width, device=device)
    gelu_grad(x, grad, sums)
    column_sums(sums, sums[:1], torch.randn(rows, 3, device=device))


def losses(device: str, sizes: Sequence[int]) -> None:
    offsets, total = _ends(sizes, device, torch.int64), sum(sizes)
    labels = torch.randint(0, 3, (total,), device=device).float()
    for scheme in ("ndcg2pp", "ndcg1"):
        scores = torch.randn(total, device=device, requires_grad=True)
        lambda_loss(scores, labels, offsets, scheme=scheme, k=3, backend="triton").backward()
    ndcg(torch.randn(total, device=device), labels, offsets, 10, backend="triton")
    scores = torch.randn(total, device=device, requires_grad=True)
    approx_ranks(scores, offsets, backend="triton").square().sum().backward()


# Arguments of the functions above for the interpreter, which takes its time and has no bf16.
INTERPRETED: dict[str, tuple[Any, ...]] = {
    "attention": ("cpu", torch.float32, (3, 0, 17), (12,)),
    "norms_and_heads": ("cpu", torch.float32, 5, (9,)),
    "vector_gradients": ("cpu", torch.float32, 5, 9),
    "losses": ("cpu", (5, 0, 7, 1)),
}


def main() -> None:
    torch.manual_seed(0)
    if torch.cuda.is_available():
        for dtype in (torch.bfloat16, torch.float32):
            attention("cuda", dtype, (5, 0, 67, 1, 33), (32, 40, 128))
            norms_and_heads("cuda", dtype, 37, (97, 384))
            vector_gradients("cuda", dtype, 37, 197)
        losses("cuda", (5, 0, 37, 1, 700))
        torch.cuda.synchronize()
    else:
        for function in (attention, norms_and_heads, vector_gradients, losses):
            function(*INTERPRETED[function.__name__])


if __name__ == "__main__":
    main()
