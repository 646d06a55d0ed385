"""Rotary position embedding of queries and keys in Triton, where they lie, after the norm of each
head if any.

A program takes all heads of a few tokens; backward leaves the sums of the norms' gradients over
them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.registry import declare
from rerank_fast.ops.triton import launcher
from rerank_fast.ops.triton.grid import cdiv, next_power_of_2
from rerank_fast.ops.triton.variant import Variant

TOKENS = 8  # a program


@functools.cache
def launch(head_size: int) -> launcher.Config:
    blocks = {
        "TOKENS": TOKENS,
        "HEAD_SIZE": head_size,
        "HALF": next_power_of_2(head_size // 2),
    }
    return launcher.Config({**blocks, "num_warps": 4, "enable_fp_fusion": True})


@triton.jit
def _halves(tensor, token, stride, first, in_tokens, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr):
    """(TOKENS, HALF) both halves of rows, fp32."""
    e = tl.arange(0, HALF)
    there = in_tokens[:, None] & (e < HEAD_SIZE // 2)[None, :]
    place = token.to(tl.int64)[:, None] * stride + first + e[None, :]
    left = tl.load(tensor + place, mask=there, other=0.0).to(tl.float32)
    right = tl.load(tensor + place + HEAD_SIZE // 2, mask=there, other=0.0).to(tl.float32)
    return left, right


@triton.jit
def _store_halves(
    tensor,
    left,
    right,
    token,
    stride,
    first,
    in_tokens,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
):
    e = tl.arange(0, HALF)
    there = in_tokens[:, None] & (e < HEAD_SIZE // 2)[None, :]
    place = token.to(tl.int64)[:, None] * stride + first + e[None, :]
    tl.store(tensor + place, left.to(tensor.dtype.element_ty), mask=there)
    tl.store(tensor + place + HEAD_SIZE // 2, right.to(tensor.dtype.element_ty), mask=there)


@triton.jit
def _weight(weights, is_key, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr):
    """Both halves of the norm's weight that a head has."""
    e = is_key * HEAD_SIZE + tl.arange(0, HALF)
    there = tl.arange(0, HALF) < HEAD_SIZE // 2
    left = tl.load(weights + e, mask=there, other=0.0)
    return left[None, :], tl.load(weights + e + HEAD_SIZE // 2, mask=there, other=0.0)[None, :]


@triton.jit(do_not_specialize=["num_tokens"])
def rotary_kernel(
    x,  # (T, heads, HEAD_SIZE): queries, then keys
    out,  # out (T, heads, HEAD_SIZE); may be x
    cos,  # (T, HEAD_SIZE) fp32
    sin,
    weights,  # (2 x HEAD_SIZE,) fp32 of the queries' RMSNorm, then of the keys'; None for no norms
    x_stride,  # of its tokens
    out_stride,
    num_tokens,
    num_heads,
    num_queries,  # of the heads
    eps,
    TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    in_tokens = token < num_tokens
    cos_left, cos_right = _halves(cos, token, HEAD_SIZE, 0, in_tokens, HEAD_SIZE, HALF)
    sin_left, sin_right = _halves(sin, token, HEAD_SIZE, 0, in_tokens, HEAD_SIZE, HALF)
    for head in range(num_heads):
        left, right = _halves(x, token, x_stride, head * HEAD_SIZE, in_tokens, HEAD_SIZE, HALF)
        if weights is not None:
            squares = tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1)
            scale = (1.0 / tl.sqrt(squares / HEAD_SIZE + eps))[:, None]
            w_left, w_right = _weight(weights, head >= num_queries, HEAD_SIZE, HALF)
            left, right = left * scale * w_left, right * scale * w_right
        turned_left = left * cos_left - right * sin_left
        turned_right = right * cos_right + left * sin_right
        first = head * HEAD_SIZE
        _store_halves(
            out, turned_left, turned_right, token, out_stride, first, in_tokens, HEAD_SIZE, HALF
        )


@triton.jit(do_not_specialize=["num_tokens"])
def rotary_grad_kernel(
    grad,  # in and out (T, heads, HEAD_SIZE): of the rotated, then of x
    x,  # (T, heads, HEAD_SIZE) as it was before the norms; None without
    cos,
    sin,
    weights,
    sums,  # out (programs, 2 x HEAD_SIZE) fp32: of the gradient of weights
    grad_stride,
    x_stride,
    num_tokens,
    num_heads,
    num_queries,
    eps,
    TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    in_tokens = token < num_tokens
    cos_left, cos_right = _halves(cos, token, HEAD_SIZE, 0, in_tokens, HEAD_SIZE, HALF)
    sin_left, sin_right = _halves(sin, token, HEAD_SIZE, 0, in_tokens, HEAD_SIZE, HALF)
    e = tl.arange(0, HALF)
    there = e < HEAD_SIZE // 2
    left_sum = tl.zeros([HALF], tl.float32)
    right_sum = tl.zeros([HALF], tl.float32)
    for head in range(num_heads):
        left, right = _halves(
            grad, token, grad_stride, head * HEAD_SIZE, in_tokens, HEAD_SIZE, HALF
        )
        d_left = left * cos_left + right * sin_right
        d_right = right * cos_right - left * sin_left
        if weights is not None:
            if head == num_queries:  # what was summed so far are the queries'
                _store_sums(sums, left_sum, right_sum, 0, there, HEAD_SIZE, HALF)
                left_sum = tl.zeros([HALF], tl.float32)
                right_sum = tl.zeros([HALF], tl.float32)
            x_left, x_right = _halves(
                x, token, x_stride, head * HEAD_SIZE, in_tokens, HEAD_SIZE, HALF
            )
            squares = tl.sum(x_left * x_left, axis=1) + tl.sum(x_right * x_right, axis=1)
            scale = (1.0 / tl.sqrt(squares / HEAD_SIZE + eps))[:, None]
            unit_left, unit_right = x_left * scale, x_right * scale
            left_sum += tl.sum(d_left * unit_left, axis=0)
            right_sum += tl.sum(d_right * unit_right, axis=0)
            w_left, w_right = _weight(weights, head >= num_queries, HEAD_SIZE, HALF)
            d_left, d_right = d_left * w_left, d_right * w_right
            along = tl.sum(d_left * unit_left, axis=1) + tl.sum(d_right * unit_right, axis=1)
            along = (along / HEAD_SIZE)[:, None]
            d_left, d_right = (
                scale * (d_left - unit_left * along),
                scale * (d_right - unit_right * along),
            )
        first = head * HEAD_SIZE
        _store_halves(grad, d_left, d_right, token, grad_stride, first, in_tokens, HEAD_SIZE, HALF)
    if weights is not None:
        _store_sums(sums, left_sum, right_sum, HEAD_SIZE, there, HEAD_SIZE, HALF)


@triton.jit
def _store_sums(sums, left, right, first, there, HEAD_SIZE: tl.constexpr, HALF: tl.constexpr):
    e = tl.arange(0, HALF)
    own = sums + tl.program_id(0).to(tl.int64) * 2 * HEAD_SIZE + first + e
    tl.store(own, left, mask=there)
    tl.store(own + HEAD_SIZE // 2, right, mask=there)


@declare("rotary", mutates=("out",))
def rotary(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor | None,
    num_queries: int,
    eps: float,
) -> None:
    """Norm and rotation of the heads of x, to where out lies: it may be x itself, where there are
    no norms.

    Args:
        x: (T, heads, head size) queries and then keys, heads contiguous.
        out: like x.
        cos: (T, head size) fp32, contiguous.
        sin: (T, head size) fp32, contiguous.
        weights: (2 x head size,) fp32 of the queries' RMSNorm, then of the keys'; None: no norms.
        num_queries: how many of the heads are queries.
        eps: of the norms.
    """
    num_tokens, num_heads, head_size = x.shape
    if x.numel() and not x.is_meta:
        launcher.launch(
            rotary_kernel,
            (cdiv(num_tokens, TOKENS),),
            (x, out, cos, sin, weights),
            (x.stride(0), out.stride(0), num_tokens, num_heads, num_queries, eps),
            launch(head_size),
        )


@declare("rotary_grad", mutates=("grad",))
def rotary_grad(
    grad: Tensor,
    x: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor | None,
    num_queries: int,
    eps: float,
) -> Tensor:
    """The gradient of rotary's x in place of that of its result.

    Args:
        grad: (T, heads, head size) of the result, and then of x.
        x: as rotary read it; None without norms.

    Returns:
        (programs, 2 head size) fp32 rows of sums of the gradient of weights; empty without.
    """
    num_tokens, num_heads, head_size = grad.shape
    programs = cdiv(num_tokens, TOKENS)
    sums = cos.new_empty(0 if weights is None else programs, 2 * head_size)
    if grad.numel() and not grad.is_meta:
        x_stride = 0 if x is None else x.stride(0)
        launcher.launch(
            rotary_grad_kernel,
            (programs,),
            (grad, x, cos, sin, weights, None if weights is None else sums),
            (grad.stride(0), x_stride, num_tokens, num_heads, num_queries, eps),
            launch(head_size),
        )
    return sums


def shipped() -> Iterator[Variant]:
    for name in ("bf16", "fp16", "fp32"):
        heads = ((64, False), (128, False), (128, True), (256, True))
        for size, norms in heads[2:3] if name == "fp16" else heads:  # is bf16 to the compiler
            for kernel in (rotary_kernel, rotary_grad_kernel):
                types = {argument: _type(argument, name) for argument in kernel.arg_names}
                left_out = (
                    ()
                    if norms
                    else ("weights", "sums", "x" if kernel is rotary_grad_kernel else "")
                )
                yield Variant(
                    f"{kernel.__name__}-{name}_{size}{'_norms' * norms}",
                    kernel,
                    types,
                    launch(size),
                    {argument: None for argument in left_out if argument in types},
                    multiples=[
                        a for a in types if types[a].startswith("*") or a.endswith("_stride")
                    ],
                )


def _type(argument: str, dtype: str) -> str:
    if argument in ("x", "out", "grad"):
        return f"*{dtype}"
    if argument == "eps":
        return "fp32"
    return "i32" if argument.startswith("num_") or argument.endswith("_stride") else "*fp32"
