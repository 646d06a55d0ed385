"""LayerNorm(residual + dropout(x)) in Triton: a row a program forward, a few rows a program
backward.

Backward computes the sum and the normalised row again. The gradients of weight and bias, and of a
bias that was added to x before, are partial sums of a fixed number of rows, added up in a fixed
order: no atomics.
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
from rerank_fast.ops.triton import autotune, dropout, guard, launcher
from rerank_fast.ops.triton.grid import cdiv, next_power_of_2
from rerank_fast.ops.triton.variant import Variant

MAX_WIDTH = 4096
ROWS = 16  # a program of backward
# What makes a case for tuning, and what it tries.
CASE = ("width", "HAS_NARROW", "HAS_DROPOUT")
AROUND: tuple[dict[str, Any], ...] = ({"num_warps": 2}, {"num_warps": 4}, {"num_warps": 8})


@functools.cache
def launch(width: int, hip: bool = guard.HIP) -> launcher.Config:
    """A row in the registers of as many warps as hold it in half of them: 1,024 threads for the
    widest.
    """
    block = next_power_of_2(width)
    most = 16 if hip else 32  # of 64 or of 32 threads
    warps = min(most, max(4, block // 128))
    return launcher.Config({"WIDTH": block, "num_warps": warps, "enable_fp_fusion": True})


@triton.jit
def _total(
    x, residual, rows, row, e, there, width, seed, threshold, rescale, HAS_DROPOUT: tl.constexpr
):
    """residual + dropout(x) of one row, and the factors of the dropout."""
    kept = tl.full(e.shape, 1.0, tl.float32)
    row = tl.full([], 0, tl.int64) + row
    if HAS_DROPOUT:
        number = dropout.numbers(rows, row, True)
        stream = dropout.row_streams(seed, tl.full([], 0, tl.uint32), number)
        kept = dropout.factors(stream, e, threshold, rescale)
    added = tl.load(x + row * width + e, mask=there, other=0.0).to(tl.float32)
    return tl.load(residual + row * width + e, mask=there, other=0.0) + kept * added, kept


@triton.jit(do_not_specialize=["seed", "threshold"])
def forward_kernel(
    x,  # (T, width) bf16, fp16 or fp32
    residual,  # (T, width) fp32
    weight,  # (width,) fp32
    bias,
    rows,  # (T,) int32, or None
    y,  # out (T, width) fp32
    narrow,  # out (T, width) in x's dtype, or None
    mean,  # out (T,) fp32
    rstd,
    width,
    eps,
    seed,
    threshold,
    rescale,
    HAS_NARROW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, WIDTH)
    there = e < width
    total, _ = _total(
        x, residual, rows, row, e, there, width, seed, threshold, rescale, HAS_DROPOUT
    )
    middle = tl.sum(total, axis=0) / width
    centered = tl.where(there, total - middle, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / width + eps)
    tl.store(mean + row, middle)
    tl.store(rstd + row, scale)
    gain = tl.load(weight + e, mask=there, other=0.0)
    result = centered * scale * gain + tl.load(bias + e, mask=there, other=0.0)
    tl.store(y + row * width + e, result, mask=there)
    if HAS_NARROW:
        tl.store(narrow + row * width + e, result.to(narrow.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["seed", "threshold", "num_rows"])
def backward_kernel(
    x,
    residual,
    weight,
    mean,
    rstd,
    grad_y,  # (T, width) fp32, or None
    grad_narrow,  # (T, width) in x's dtype, or None
    rows,
    dx,  # out (T, width) in x's dtype
    d_residual,  # out (T, width) fp32
    # out (programs, 2 or 3 x width) fp32: each program's of the gradients of weight, bias and a
    # bias of x
    sums,
    sums_stride,
    num_rows,
    width,
    seed,
    threshold,
    rescale,
    HAS_WIDE: tl.constexpr,
    HAS_NARROW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
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
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, num_rows)):
        total, kept = _total(
            x, residual, rows, row, e, there, width, seed, threshold, rescale, HAS_DROPOUT
        )
        scale = tl.load(rstd + row)
        unit = tl.where(there, (total - tl.load(mean + row)) * scale, 0.0)
        grad = tl.zeros([WIDTH], tl.float32)
        if HAS_WIDE:
            grad += tl.load(grad_y + row * width + e, mask=there, other=0.0)
        if HAS_NARROW:
            grad += tl.load(grad_narrow + row * width + e, mask=there, other=0.0).to(tl.float32)
        weight_sum += grad * unit
        bias_sum += grad
        weighted = grad * gain
        along = tl.sum(weighted * unit, axis=0) / width
        d_total = scale * (weighted - tl.sum(weighted, axis=0) / width - unit * along)
        tl.store(d_residual + row * width + e, d_total, mask=there)
        d_added = d_total * kept
        if HAS_X_BIAS:
            x_sum += d_added
        tl.store(dx + row * width + e, d_added.to(dx.dtype.element_ty), mask=there)
    own = sums + program * sums_stride + e
    tl.store(own, weight_sum, mask=there)
    tl.store(own + width, bias_sum, mask=there)
    if HAS_X_BIAS:
        tl.store(own + 2 * width, x_sum, mask=there)


def forward(
    x: Tensor,  # (T, H) bf16, fp16 or fp32, contiguous as all that follow
    residual: Tensor,  # (T, H) fp32
    weight: Tensor,  # (H,) fp32
    bias: Tensor,  # (H,) fp32
    rows: Tensor | None,  # (T,) int32
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend contract: y (T, H) fp32, y in x's dtype, mean (T,) and rstd (T,) fp32 for
    backward.
    """
    guard.require_gpu(x)
    y = torch.empty_like(residual)
    has_narrow = x.dtype != torch.float32
    narrow = torch.empty_like(x) if has_narrow else y.new_empty(0)
    mean, rstd = residual.new_empty(x.shape[0]), residual.new_empty(x.shape[0])
    if x.numel():
        kernel, config = autotune.choose(forward_kernel, launch(x.shape[1]), AROUND, CASE)
        launcher.launch(
            kernel,
            (x.shape[0],),
            (x, residual, weight, bias, rows, y, narrow if has_narrow else None, mean, rstd),
            (x.shape[1], eps, *dropout.scalars(dropout_p, seed)),
            launcher.constants(HAS_NARROW=has_narrow, HAS_DROPOUT=dropout_p > 0),
            config,
        )
    return y, narrow, mean, rstd


def backward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_y: Tensor | None,
    grad_narrow: Tensor | None,
    rows: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of x, residual, weight and bias."""
    guard.require_gpu(x)
    width = x.shape[1]
    sums = residual.new_empty(programs(x.shape[0]), 2 * width)
    given = (x, residual, weight, mean, rstd, grad_y, grad_narrow, rows)
    dx, d_residual = residual_norm_grads(*given, sums, dropout_p, seed)
    d_weight, d_bias = sums.sum(0).split(width)
    return dx, d_residual, d_weight, d_bias


def programs(num_rows: int) -> int:
    """Of a launch of backward over so many rows: each leaves a row of sums."""
    return cdiv(num_rows, ROWS)


@declare("residual_norm_grads", mutates=("sums",))
def residual_norm_grads(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_y: Tensor | None,
    grad_narrow: Tensor | None,
    rows: Tensor | None,
    sums: Tensor,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and residual; those of the vectors are left in sums, to be added up.

    Args:
        sums: (programs, 2 H or 3 H) fp32, each row contiguous: of weight, bias and, in the last
            third, of what was added to all rows of x.
    """
    dx, d_residual = torch.empty_like(x), torch.empty_like(residual)
    if x.numel() and not x.is_meta:
        kernel, config = autotune.choose(backward_kernel, launch(x.shape[1]), AROUND, CASE)
        num_rows, width = x.shape
        launcher.launch(
            kernel,
            (sums.shape[0],),
            (x, residual, weight, mean, rstd, grad_y, grad_narrow, rows, dx, d_residual, sums),
            (sums.stride(0), num_rows, width, *dropout.scalars(dropout_p, seed)),
            launcher.constants(
                HAS_WIDE=grad_y is not None,
                HAS_NARROW=grad_narrow is not None,
                HAS_DROPOUT=dropout_p > 0,
                HAS_X_BIAS=sums.shape[1] == 3 * width,
                ROWS=ROWS,
            ),
            config,
        )
    return dx, d_residual


def shipped() -> Iterator[Variant]:
    cases = ("", "_dropout", "_dropout_rows")
    for name, widths, own_cases in (
        ("bf16", (384, 1024, 4096), cases),
        ("fp16", (1024,), cases[1:2]),  # is bf16 to the compiler
        ("fp32", (384, 1024, 4096), (cases[0], cases[2])),
    ):
        for width in widths:
            for case in own_cases:
                for kernel in (forward_kernel, backward_kernel):
                    constants: dict[str, Any] = {
                        "HAS_NARROW": name != "fp32",
                        "HAS_DROPOUT": case != "",
                    }
                    if not case.endswith("rows"):
                        constants["rows"] = None
                    if kernel is backward_kernel:
                        constants |= {"HAS_WIDE": True, "HAS_X_BIAS": True, "ROWS": ROWS}
                    types = {argument: _type(argument, name) for argument in kernel.arg_names}
                    if name == "fp32":
                        constants["narrow" if kernel is forward_kernel else "grad_narrow"] = None
                    yield Variant(
                        f"residual_norm-{kernel.__name__}_{name}_{width}{case}",
                        kernel,
                        types,
                        launch(width, hip=False),
                        constants,
                        launch(width, hip=True),
                        multiples=[
                            a
                            for a in types
                            if types[a].startswith("*") or a in ("width", "sums_stride")
                        ],
                    )


def _type(argument: str, dtype: str) -> str:
    if argument in ("x", "narrow", "grad_narrow", "dx"):
        return f"*{dtype}"
    if argument in ("eps", "rescale"):
        return "fp32"
    if argument == "rows":
        return "*i32"
    return (
        "i32" if argument in ("width", "sums_stride", "num_rows", "seed", "threshold") else "*fp32"
    )
