"""A norm before a sublayer in Triton: residual + x, or residual + RMSNorm(x), and the LayerNorm or
RMSNorm of the sum as products read it, in one pass.

A row a program forward, a few rows a program backward, which leaves the sums of weight's and bias's
gradients over its rows: no atomics.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.registry import declare
from rerank_fast.ops.triton import guard, launcher
from rerank_fast.ops.triton.residual_norm import ROWS, launch, programs
from rerank_fast.ops.triton.variant import Variant


@functools.cache
def _limited(width: int, hip: bool = guard.HIP) -> launcher.Config:
    """For the gradient through both norms: without the limit it spills on sm_80, of no more
    registers.
    """
    return launcher.Config(guard.for_vendor({**launch(width, hip), "maxnreg": 64}, hip=hip))


@triton.jit
def add_norm_kernel(
    residual,  # (T, width) fp32
    x,  # (T, width) bf16, fp16 or fp32, or None
    x_weight,  # (width,) fp32 of the norm of x, or None: it is added as it is
    weight,  # (width,) fp32
    bias,  # (width,) fp32, or None
    total,  # out (T, width) fp32, or None without x
    normed,  # out (T, width)
    mean,  # out (T,) fp32, or None: RMSNorm
    rstd,
    x_rstd,  # out (T,) fp32, or None with x_weight
    width,
    eps,
    x_eps,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, WIDTH)
    there = e < width
    own = tl.load(residual + row * width + e, mask=there, other=0.0)
    if x is not None:
        added = tl.load(x + row * width + e, mask=there, other=0.0).to(tl.float32)
        if x_weight is not None:
            x_scale = 1.0 / tl.sqrt(tl.sum(added * added, axis=0) / width + x_eps)
            tl.store(x_rstd + row, x_scale)
            added *= x_scale * tl.load(x_weight + e, mask=there, other=0.0)
        own += added
        tl.store(total + row * width + e, own, mask=there)
    if mean is not None:
        middle = tl.sum(own, axis=0) / width
        tl.store(mean + row, middle)
        own = tl.where(there, own - middle, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(own * own, axis=0) / width + eps)
    tl.store(rstd + row, scale)
    result = own * scale * tl.load(weight + e, mask=there, other=0.0)
    if bias is not None:
        result += tl.load(bias + e, mask=there, other=0.0)
    tl.store(normed + row * width + e, result.to(normed.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_rows"])
def add_norm_grad_kernel(
    total,  # (T, width) fp32
    weight,
    mean,  # (T,) fp32, or None: RMSNorm
    rstd,
    x,  # (T, width) in its dtype, or None, as the two that follow: it was added as it is
    x_weight,
    x_rstd,  # (T,) fp32
    grad_normed,  # (T, width) in the dtype of normed
    grad_total,  # (T, width) fp32, or None
    dx,  # out (T, width) in x's dtype, or None
    d_residual,  # out (T, width) fp32
    # out (programs, 1 to 3 x width) fp32: of the gradients of weight, with a mean of bias, and with
    # x of x_weight
    sums,
    sums_stride,
    num_rows,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, WIDTH)
    there = e < width
    gain = tl.load(weight + e, mask=there, other=0.0)
    weight_sum = tl.zeros([WIDTH], tl.float32)
    bias_sum = tl.zeros([WIDTH], tl.float32)
    x_sum = tl.zeros([WIDTH], tl.float32)
    if x is not None:
        x_gain = tl.load(x_weight + e, mask=there, other=0.0)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, num_rows)):
        unit = tl.load(total + row * width + e, mask=there, other=0.0)
        scale = tl.load(rstd + row)
        if mean is not None:
            unit = tl.where(there, unit - tl.load(mean + row), 0.0)
        unit *= scale
        grad = tl.load(grad_normed + row * width + e, mask=there, other=0.0).to(tl.float32)
        weight_sum += grad * unit
        bias_sum += grad
        weighted = grad * gain
        result = weighted - unit * (tl.sum(weighted * unit, axis=0) / width)
        if mean is not None:
            result -= tl.sum(weighted, axis=0) / width
        result *= scale
        if grad_total is not None:
            result += tl.load(grad_total + row * width + e, mask=there, other=0.0)
        tl.store(d_residual + row * width + e, result, mask=there)
        if x is not None:
            x_scale = tl.load(x_rstd + row)
            unit = tl.load(x + row * width + e, mask=there, other=0.0).to(tl.float32) * x_scale
            x_sum += result * unit
            weighted = result * x_gain
            result = x_scale * (weighted - unit * (tl.sum(weighted * unit, axis=0) / width))
        if dx is not None:
            tl.store(dx + row * width + e, result.to(dx.dtype.element_ty), mask=there)
    own = sums + program * sums_stride + e
    tl.store(own, weight_sum, mask=there)
    if mean is not None:
        own += width
        tl.store(own, bias_sum, mask=there)
    if x is not None:
        tl.store(own + width, x_sum, mask=there)


@declare("add_norm")
def add_norm(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
    x_weight: Tensor | None,
    x_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """residual + x, or residual + RMSNorm(x), and the norm of the sum, without a graph.

    Args:
        residual: (T, H) fp32, contiguous as all tensors here; H of at most residual_norm's
            MAX_WIDTH.
        x: (T, H) what is added; None where nothing is, and the first result is then empty.
        weight: (H,) fp32 of the norm.
        bias: (H,) fp32 or None.
        eps: of the norm.
        centered: LayerNorm; else RMSNorm, whose mean is empty.
        dtype: of the norm's result.
        x_weight: (H,) fp32 of the norm of x; None without x, and where it is added as it is.
        x_eps: of the norm of x.

    Returns:
        (T, H) fp32 sum, (T, H) norm, (T,) fp32 mean and reciprocal of the deviation, and of x's
        norm, empty without.
    """
    num_rows, width = residual.shape
    total = residual.new_empty(residual.shape if x is not None else 0)
    normed = residual.new_empty(residual.shape, dtype=dtype)
    mean, rstd = residual.new_empty(num_rows if centered else 0), residual.new_empty(num_rows)
    x_rstd = residual.new_empty(0 if x_weight is None else num_rows)
    if residual.numel() and not residual.is_meta:
        made = (None if x is None else total, normed, mean if centered else None, rstd)
        tensors = (residual, x, x_weight, weight, bias, *made, None if x_weight is None else x_rstd)
        launcher.launch(add_norm_kernel, (num_rows,), tensors, (width, eps, x_eps), launch(width))
    return total, normed, mean, rstd, x_rstd


@declare("add_norm_grads", mutates=("sums",))
def add_norm_grads(
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_normed: Tensor,
    grad_total: Tensor | None,
    sums: Tensor,
    has_x: bool,
    x: Tensor | None,
    x_weight: Tensor | None,
    x_rstd: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x, in grad_normed's dtype and empty without one, and of the residual (T, H)
    fp32.

    Args:
        total: (T, H) fp32 what was normed.
        sums: (programs, H) fp32, twice as wide for a LayerNorm and H wider for a norm of x: rows of
            sums of the gradients of weight, bias and x_weight.
        x: (T, H) as add_norm read it; None, as the two behind it, where it was not normed.
    """
    num_rows, width = total.shape
    dx = grad_normed.new_empty(total.shape if has_x else 0)
    d_residual = torch.empty_like(total)
    if total.numel() and not total.is_meta:
        of_sum = (total, weight, mean if mean.numel() else None, rstd)
        given = (*of_sum, x, x_weight, x_rstd, grad_normed, grad_total)
        launcher.launch(
            add_norm_grad_kernel,
            (programs(num_rows),),
            (*given, dx if has_x else None, d_residual, sums),
            (sums.stride(0), num_rows, width),
            launcher.constants(ROWS=ROWS),
            launch(width) if x is None else _limited(width),
        )
    return dx, d_residual


def shipped() -> Iterator[Variant]:
    for name in ("bf16", "fp16", "fp32"):
        for width in (1024,) if name == "fp16" else (768, 1024, 4096):  # is bf16 to the compiler
            for case in ("layer", "rms", "rms_rms"):
                for kernel in (add_norm_kernel, add_norm_grad_kernel):
                    types = {argument: _type(argument, name) for argument in kernel.arg_names}
                    constants: dict[str, Any] = {"bias": None}
                    of_x, launched = ["x_weight", "x_rstd"], launch
                    if kernel is add_norm_grad_kernel:
                        constants, of_x = {"ROWS": ROWS}, ["x", *of_x]
                    if case != "layer":
                        constants["mean"] = None
                    if case != "rms_rms":
                        constants |= dict.fromkeys(of_x)
                    elif kernel is add_norm_grad_kernel:
                        launched = _limited
                    yield Variant(
                        f"{kernel.__name__}-{name}_{width}_{case}",
                        kernel,
                        types,
                        launched(width, hip=False),
                        constants,
                        launched(width, hip=True),
                        multiples=[
                            a
                            for a in types
                            if types[a].startswith("*") or a in ("width", "sums_stride")
                        ],
                    )


def _type(argument: str, dtype: str) -> str:
    if argument in ("x", "normed", "grad_normed", "dx"):
        return f"*{dtype}"
    if argument in ("eps", "x_eps"):
        return "fp32"
    return "i32" if argument in ("width", "sums_stride", "num_rows") else "*fp32"
