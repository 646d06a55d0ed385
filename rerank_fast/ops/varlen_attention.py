"""Attention over packed sequences: schema -> fake -> backends -> autograd.Function ->
varlen_attention().
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rerank_fast.ops import flash
from rerank_fast.ops.cpu import attention as cpu_attention
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.dropout import check_rows
from rerank_fast.ops.layout import contiguous, rows_contiguous
from rerank_fast.ops.options import (
    check_flag,
    check_lengths,
    check_number,
    check_positive,
    check_seed,
    check_share,
    check_window,
)
from rerank_fast.ops.reference import varlen_attention as reference
from rerank_fast.ops.registry import Backends, Served, declare
from rerank_fast.ops.relative_attention import RelativeAttention, fake_forward
from rerank_fast.ops.relative_positions import RelativePositions

Backend = Literal["reference", "cpu", "triton", "flash"]


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _cpu_refusal(q: Tensor, *library_call: Any) -> str:
    served = q.is_cpu and q.dtype in (torch.float32, torch.bfloat16) and q.shape[2] <= 256
    return (
        "" if served else f"takes fp32 or bf16 CPU tensors of head size up to 256, got {_what(q)}"
    )


def _triton_refusal(
    q: Tensor,
    k: Tensor | None = None,
    scale: float = 1.0,
    window: tuple[int, int] = (-1, -1),
    dropout_p: float = 0.0,
    max_seqlens: tuple[int, int] | None = None,
    has_relative: bool = False,
    softcap: float | None = None,
) -> str:
    widest = (64 if q.dtype == torch.float32 else 128) if has_relative else 256
    if q.dtype in (torch.float16, torch.bfloat16, torch.float32) and q.shape[2] <= widest:
        return ""
    of_what = f"{widest} with relative positions" if has_relative else widest
    return f"takes fp16, bf16 or fp32 of head size up to {of_what}, got {_what(q)}"


def _flash_refusal(
    q: Tensor,
    k: Tensor | None = None,
    scale: float = 1.0,
    window: tuple[int, int] = (-1, -1),
    dropout_p: float = 0.0,
    max_seqlens: tuple[int, int] | None = None,
    has_relative: bool = False,
    softcap: float | None = None,
) -> str:
    if has_relative:
        return "has no relative positions"
    if not q.is_cuda or torch.version.hip is not None:
        return f"takes tensors on an NVIDIA GPU, got {_what(q)}"
    if dropout_p > 0 or max_seqlens is None or k is None:
        return "has no dropout and needs max_seqlens"
    if q.shape[0] == 0:
        return "takes one query at least, got none"
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] > 256 or q.shape[2] % 8:
        return f"takes fp16 or bf16 of a head size that 8 divides, up to 256, got {_what(q)}"
    if _capability(q.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or above"
    return flash.refusal(q, k, scale, window, softcap)


def _what(q: Tensor) -> str:
    return f"{q.dtype} on {q.device} of head size {q.shape[2]}"


def _triton() -> tuple[Callable[..., Any], ...]:
    from rerank_fast.ops.triton import varlen_attention, varlen_attention_backward

    return varlen_attention.forward, varlen_attention_backward.backward


def _libraries() -> tuple[Callable[..., Any], ...]:
    """A library's function has its own gradient; which one it is follows from the call."""
    return ()


_BACKENDS = Backends(
    "varlen_attention",
    reference=Served(lambda: (reference.forward, reference.backward)),
    cpu=Served(
        lambda: (cpu_attention.varlen_attention_forward, cpu_attention.varlen_attention_backward),
        _cpu_refusal,
    ),
    triton=Served(_triton, _triton_refusal),
    flash=Served(_libraries, _flash_refusal),
)


def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@declare("varlen_attention", fake=fake_forward)
def unchecked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: int,
    backend: str,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    forward, _ = _BACKENDS[backend]
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    places = contiguous(cu_seqlens_q, cu_seqlens_k, rows)
    options = (scale, window_left, window_right, dropout_p, seed)
    return forward(q, k, v, *places, *options, softcap=softcap)


@declare("varlen_attention_backward", fake=_fake_backward)
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: int,
    backend: str,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _, backward = _BACKENDS[backend]
    q, k, v, grad_out = (rows_contiguous(tensor) for tensor in (q, k, v, grad_out))
    places = contiguous(cu_seqlens_q, cu_seqlens_k, rows)
    options = (scale, window_left, window_right, dropout_p, seed)
    return backward(q, k, v, out, lse, grad_out, *places, *options, softcap=softcap)


def unchecked_backward(
    *arguments: Any, softcap: float | None = None, into: Sequence[Tensor]
) -> None:
    """Its gradients, written to `into`: tensors of the shapes of q, k and v, each head's row
    contiguous.
    """
    *tensors_and_options, backend = arguments
    _, backward = _BACKENDS[backend]
    backward(*tensors_and_options, softcap=softcap, into=into)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor
        | None,  # None: as cu_seqlens_q; torch.compile refuses one tensor in two places
        rows: Tensor | None,
        options: tuple[Any, ...],
    ) -> Tensor:
        ends = (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)
        out, lse = unchecked_forward(q, k, v, *ends, rows, *options)
        ctx.save_for_backward(q, k, v, out, lse, *ends, rows)
        ctx.options = options
        return out

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *places = ctx.saved_tensors
        grads = _backward(q, k, v, out, lse, grad_out, *places, *ctx.options)
        return *grads, None, None, None, None


def own_backend_for(q: Tensor) -> str:
    """Of the backends that unchecked_forward takes the one that serves (tokens, heads, head size)
    queries.
    """
    return _BACKENDS.resolve(None, q)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3 or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a floating-point tensor of shape (tokens, heads, head_size), "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if 0 in q.shape[1:]:
        raise ValueError(
            f"q must have at least 1 head and a head_size of at least 1, got {tuple(q.shape)}"
        )
    if k.shape != v.shape or q.shape[2] != k.shape[2] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "k and v must have one shape, q their head size and a multiple of their heads, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    for name, ends, tokens in (
        ("cu_seqlens_q", cu_seqlens_q, q),
        ("cu_seqlens_k", cu_seqlens_k, k),
    ):
        if ends.dim() != 1 or ends.dtype != torch.int32 or ends.shape[0] < 1:
            raise ValueError(
                f"{name} must be int32 of shape (N + 1,), got {ends.dtype} {tuple(ends.shape)}"
            )
        if ends.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {ends.device}")
        if ends.shape[0] == 1 and tokens.shape[0]:
            raise ValueError(
                f"{name} must rise from 0 to {tokens.shape[0]} tokens, got a single one"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must count the same sequences, "
            f"got {cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}"
        )


def varlen_attention(
    q: Tensor,  # (Tq, heads, head_size)
    k: Tensor,  # (Tk, kv_heads, head_size)
    v: Tensor,  # (Tk, kv_heads, head_size)
    cu_seqlens_q: Tensor,  # (N + 1,) int32
    cu_seqlens_k: Tensor,  # (N + 1,) int32
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    rows: Tensor | None = None,  # (Tq,) int32
    relative: RelativePositions | None = None,
    softcap: float | None = None,
    max_seqlens: tuple[int, int] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v of each of N sequences that lie one after the other, without
    padding.

    Args:
        q: (Tq, heads, head_size) queries of all sequences; fp32, bf16 or, on a GPU, fp16 (any dtype
            on the reference).
        k: (Tk, kv_heads, head_size) keys; kv_heads divides heads.
        v: (Tk, kv_heads, head_size) values.
        cu_seqlens_q: (N + 1,) int32 cumulative queries; a sequence may have fewer queries than
            keys.
        cu_seqlens_k: (N + 1,) int32 cumulative keys. Those of a GPU are not waited for: a sequence
            that does not lie in the tokens gives NaN, and where they do not rise from 0 to all of
            them results mean nothing.
        scale: of the scores; None takes head_size ** -0.5.
        causal: query i of Lq reads the keys up to i + Lk - Lq.
        window: (left, right): query i reads the keys from i + Lk - Lq - left to i + Lk - Lq +
            right; -1 is unlimited.
        dropout_p: share of the attention probabilities that is dropped.
        seed: chooses which; the same seed drops the same ones, on every backend and in backward.
        rows: (Tq,) int32 numbers that stand for the queries in that choice: some sequences of many,
            computed alone, lose what they lost there. None takes 0 to Tq - 1.
        relative: terms of the scores by the distance of query and key; as many heads of keys as of
            queries, and neither causal, window nor softcap.
        softcap: a score s becomes softcap * tanh(s / softcap) before any is masked; None leaves it.
        max_seqlens: most queries and most keys of any sequence, as known on the host; "flash" needs
            them, and nothing here reads them from a device.
        backend: "cpu" (C++), "flash" (the package flash_attn or torch.nn.attention.varlen, on
            NVIDIA GPUs: fp16 or bf16, no dropout, a softcap by flash_attn alone), "triton" (GPUs)
            or "reference"; None takes the best that can run. All but torch.nn.attention.varlen give
            the same bits every time; it does under torch.use_deterministic_algorithms(True).

    Returns:
        (Tq, heads, head_size) in q's dtype, accumulated in fp32 at least; a query that may read
        nothing gives 0. NaN and infinities in a query stay in its result, and in a key or value in
        those of its sequence: NaN where a query reads them, and perhaps where it may not, since a
        weight of 0 times NaN is NaN. Differentiating twice raises RuntimeError.

    Raises:
        ValueError: a wrong shape, dtype, device or option, a backend that can't run here, or
            cu_seqlens on the CPU that do not rise from 0 to the tokens.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_flag("causal", causal)
    left, right = check_window(window)
    max_seqlens = check_lengths("max_seqlens", max_seqlens)
    dropout_p, seed = check_share("dropout_p", dropout_p), check_seed(seed)
    check_rows(rows, q)
    if causal:
        right = 0
    scale = q.shape[2] ** -0.5 if scale is None else check_number("scale", scale)
    softcap = None if softcap is None else check_positive("softcap", softcap)
    if relative is not None:
        relative.check(q, k)
        if (left, right) != (-1, -1) or softcap is not None:
            raise ValueError(
                "relative positions need causal=False, window=None and softcap=None, "
                f"got causal={causal}, window={window} and softcap={softcap}"
            )
    call = (k, scale, (left, right), dropout_p, max_seqlens, relative is not None, softcap)
    backend_name = _BACKENDS.resolve(backend, q, *call)
    if backend_name == "flash":
        library = flash.serving(q, k, scale, (left, right), softcap)
        assert library is not None
        assert max_seqlens is not None
        return library(
            *(rows_contiguous(tensor) for tensor in (q, k, v)),
            *(ends.contiguous() for ends in (cu_seqlens_q, cu_seqlens_k)),
            *max_seqlens,
            scale=scale,
            window=(left, right),
            softcap=softcap,
        )
    own_ends = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    rows = rows if dropout_p > 0 else None
    if relative is not None:
        return RelativeAttention.apply(
            q,
            k,
            v,
            cu_seqlens_q,
            own_ends,
            rows,
            *relative.parts,
            (scale, dropout_p, seed, backend_name),
        )
    options = (scale, left, right, dropout_p, seed, backend_name, softcap)
    return _VarlenAttention.apply(q, k, v, cu_seqlens_q, own_ends, rows, options)
