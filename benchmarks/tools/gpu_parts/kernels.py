"""Each kernel beside its library rival: time, and its share of the copy bandwidth and of the
product's peak."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tools import gpu_workloads
from benchmarks.tools.gpu_parts import ceilings
from benchmarks.tools.gpu_parts.results import Results, rate
from benchmarks.tools.gpu_parts.timing import kernel_seconds
from rerank_fast.model.packed.linear import NarrowCopies, StepLinear
from rerank_fast.ops import flash
from rerank_fast.ops.lambda_loss import lambda_loss
from rerank_fast.ops.ndcg import ndcg
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.score_head import score_head
from rerank_fast.ops.varlen_attention import varlen_attention


@dataclass
class Case:
    """Calls that do the same work, ours first.

    moved and flops: bytes that must be read or written, and operations of products, by a part of
    the calls' names; the first that fits counts.
    """

    name: str
    calls: dict[str, Callable[[], object]]
    moved: int
    flops: int = 0
    refused: dict[str, str] = field(default_factory=dict)  # rivals that can't take it, and why


def run(results: Results) -> None:
    copied, multiplied = ceilings.measured(results)
    for make in (attention, norms, feed_forward, heads, losses, metrics):
        for case in make(results.device, results.dry):
            for name, call in case.calls.items():
                seconds = kernel_seconds(call, results.device)
                moved, flops = rate(case.moved, seconds), rate(case.flops, seconds)
                results.add(
                    f"{case.name}: {name}",
                    bytes=case.moved,
                    flops=case.flops,
                    measured_seconds=seconds,
                    measured_bytes_per_second=moved,
                    measured_flops_per_second=flops,
                    measured_share_of_copy=moved / copied if moved and copied else None,
                    measured_share_of_product=flops / multiplied if flops and multiplied else None,
                )
            for name, reason in case.refused.items():
                results.add(f"{case.name}: {name}", left_out=reason)


def _lengths(dry: bool) -> np.ndarray:
    """Of the training step's pairs, longest first, as the planner sorts them."""
    return np.sort(gpu_workloads.training_lists(64, small=dry).pairs.lengths)[::-1].copy()


# Heads, heads of keys, head size, window, causal.
_ATTENTION = {
    "MiniLM": (12, 12, 32, (-1, -1)),
    "BERT-base": (12, 12, 64, (-1, -1)),
    "ModernBERT, local": (12, 12, 64, (64, 64)),
    "Qwen3-0.6B": (16, 8, 128, (-1, 0)),
}


def attention(device: torch.device, dry: bool) -> Iterator[Case]:
    lengths = _lengths(dry)
    for name, (heads, kv_heads, size, window) in _ATTENTION.items():
        if dry:
            heads, kv_heads, size = 2, 2 * kv_heads // heads, 16
        yield from _attention_of(
            f"attention {name}", lengths, (heads, kv_heads, size), window, device
        )


def _attention_of(
    name: str,
    lengths: np.ndarray,
    sizes: tuple[int, int, int],
    window: tuple[int, int],
    device: torch.device,
) -> Iterator[Case]:
    heads, kv_heads, size = sizes
    tokens, longest = int(lengths.sum()), int(lengths.max())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(tokens, count, size, device=device, dtype=dtype, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    )
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    scale = size**-0.5

    def ours(**options: Any) -> Tensor:
        backend = "triton" if device.type == "cuda" else "reference"
        return varlen_attention(q, k, v, ends, ends, window=window, backend=backend, **options)

    calls: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "ours, dropout": lambda: ours(dropout_p=0.1, seed=1),
    }
    refused = {}
    for library in flash.libraries():
        if reason := library.lacks(q, k, scale, window) or (
            "" if q.is_cuda else "a kernel for the CPU"
        ):
            refused[library.name] = f"has no {reason.removeprefix('a ')}"
            continue
        calls[library.name] = lambda one=library: one(
            q, k, v, ends, ends, longest, longest, scale=scale, window=window
        )
    calls["SDPA of the padded batch"] = _padded(
        lengths, (heads, kv_heads, size), window, device, dtype
    )
    keys = _keys_read(lengths, window)
    moved = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    flops = 4 * heads * size * keys
    yield Case(f"{name}, forward", {**calls}, moved, flops, refused)
    # Backward reads these, what forward wrote and its gradient, and writes three gradients; it
    # makes the probabilities anew.
    both = {what: _with_gradient(call) for what, call in calls.items()}
    yield Case(f"{name}, forward and backward", both, 3 * moved, int(3.5 * flops))


def _with_gradient(call: Callable[[], Tensor]) -> Callable[[], None]:
    grad = torch.ones_like(call())
    return lambda: call().backward(grad)


def _keys_read(lengths: np.ndarray, window: tuple[int, int]) -> int:
    """By all queries of one head."""
    total = 0
    for length in lengths.tolist():
        places = np.arange(length)
        left, right = (length if side < 0 else side for side in window)
        first, last = np.maximum(places - left, 0), np.minimum(places + right, length - 1)
        total += int((last - first + 1).sum())
    return total


def _padded(
    lengths: np.ndarray,
    sizes: tuple[int, int, int],
    window: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], Tensor]:
    """One call of the batch padded to its longest, with both sides of a window or neither."""
    heads, kv_heads, size = sizes
    number, longest = len(lengths), int(lengths.max())
    q, k, v = (
        torch.randn(number, count, longest, size, device=device, dtype=dtype, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    )
    if window == (-1, 0):  # what is padded comes after all that counts
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    places = torch.arange(longest, device=device)
    mask = places < torch.tensor(lengths, device=device)[:, None, None, None]
    if window != (-1, -1):
        apart = places[None, :] - places[:, None]  # of a key from a query
        mask = mask & (apart >= -window[0]) & (apart <= window[1])
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def norms(device: torch.device, dry: bool) -> Iterator[Case]:
    rows, narrow = (5, torch.float32) if dry else (10400, torch.bfloat16)
    for width in (8,) if dry else (384, 768, 1024):
        x = torch.randn(rows, width, device=device, dtype=narrow, requires_grad=True)
        stream = torch.randn(rows, width, device=device, requires_grad=True)
        weight, bias = (torch.randn(width, device=device, requires_grad=True) for _ in range(2))

        def ours(x=x, stream=stream, weight=weight, bias=bias) -> Tensor:
            return residual_norm(x, stream, weight, bias, eps=1e-12, dropout_p=0.1, seed=1)[0]

        def eager(x=x, stream=stream, weight=weight, bias=bias) -> Tensor:
            wide = F.layer_norm(stream + F.dropout(x, 0.1), weight.shape, weight, bias, 1e-12)
            wide.to(x.dtype)
            return wide

        moved = rows * width * (2 * 4 + 2 * x.element_size())
        calls = {"ours": ours, "F.layer_norm, F.dropout": eager}
        yield Case(f"residual norm of {width}, forward", dict(calls), moved)
        both = {what: _with_gradient(call) for what, call in calls.items()}
        yield Case(
            f"residual norm of {width}, forward and backward",
            both,
            moved + rows * width * (3 * 4 + 2 * 2),
        )


def feed_forward(device: torch.device, dry: bool) -> Iterator[Case]:
    """A layer's first product and its GELU, of fp32 weights in bf16, as a step makes it."""
    rows, width, inner = (5, 8, 16) if dry else (10400, 384, 1536)
    module = nn.Linear(width, inner, device=device)
    x = torch.randn(rows, width, device=device).bfloat16().requires_grad_()
    copies = NarrowCopies()
    step = StepLinear([module], torch.bfloat16, rows, nn.GELU(), copies)
    copies.fill()
    weight, bias = (
        one.detach().bfloat16().requires_grad_() for one in (module.weight, module.bias)
    )
    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: step(x),
        "F.gelu(F.linear) in bf16": lambda: F.gelu(F.linear(x, weight, bias)),
    }
    moved, flops = 2 * (rows * (width + inner) + width * inner), 2 * rows * width * inner
    yield Case("linear and GELU, forward", dict(calls), moved, flops)
    both = {what: _with_gradient(call) for what, call in calls.items()}
    yield Case("linear and GELU, forward and backward", both, 3 * moved, 3 * flops)


def heads(device: torch.device, dry: bool) -> Iterator[Case]:
    rows = 5 if dry else 104
    for width in (8,) if dry else (384, 1024):
        hidden = torch.randn(rows, width, device=device, requires_grad=True)
        dense, out = nn.Linear(width, width, device=device), nn.Linear(width, 1, device=device)

        def ours(hidden=hidden, dense=dense, out=out) -> Tensor:
            weights = dense.weight, dense.bias, out.weight, out.bias
            return score_head(hidden, None, *weights, dropout_p=0.1, training=True, seed=1)

        def eager(hidden=hidden, dense=dense, out=out) -> Tensor:
            return out(F.dropout(torch.tanh(dense(hidden)), 0.1))[:, 0]

        both = {"ours": _with_gradient(ours), "eager": _with_gradient(eager)}
        flops = 6 * rows * width**2
        yield Case(f"score head of {width}, forward and backward", both, 4 * 3 * width**2, flops)


class _Scores(nn.Module):
    """Stands in for their CrossEncoder, so that the loss alone is timed."""

    num_labels = 1

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores, self.device = scores, scores.device

    def preprocess(self, pairs: Any, prompt: Any = None, task: Any = None) -> dict[str, Any]:
        return {}

    def forward(self, features: Any) -> dict[str, Tensor]:
        return {"scores": self.scores}


def losses(device: torch.device, dry: bool) -> Iterator[Case]:
    for number, documents in ((2, 3),) if dry else ((16, 7), (1, 1000), (64, 128), (16, 1000)):
        generator = torch.Generator().manual_seed(0)
        labels = (torch.rand(number, documents, generator=generator) < 0.15).float().to(device)
        scores = torch.randn(number * documents, generator=generator).to(device).requires_grad_()
        offsets = torch.arange(number + 1, device=device) * documents
        flat = labels.flatten()
        calls = {"ours": lambda a=scores, b=flat, c=offsets: lambda_loss(a, b, c).backward()}
        refused = {}
        try:
            from sentence_transformers.cross_encoder.losses import LambdaLoss
        except ImportError as error:
            refused["sentence-transformers"] = str(error)
        else:
            loss = LambdaLoss(_Scores(scores), mini_batch_size=-1)
            inputs = [["q"] * number, [["d"] * documents] * number]
            rows = list(labels)
            calls["sentence-transformers"] = lambda a=loss, b=inputs, c=rows: a(b, c).backward()
        name = f"LambdaLoss of {number} x {documents}, forward and backward"
        yield Case(name, calls, 4 * 3 * scores.numel(), refused=refused)


def metrics(device: torch.device, dry: bool) -> Iterator[Case]:
    number, documents = (2, 3) if dry else (1000, 100)
    scores = torch.randn(number * documents, device=device)
    labels = (torch.rand_like(scores) < 0.1).float()
    offsets = torch.arange(number + 1, device=device) * documents
    calls = {
        "ours": lambda: ndcg(scores, labels, offsets, 10),
        "eager": lambda: ndcg(scores, labels, offsets, 10, backend="reference"),
    }
    yield Case(f"NDCG of {number} x {documents}", calls, 4 * 2 * scores.numel())
