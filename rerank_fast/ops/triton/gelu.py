"""The gradient of GELU in Triton, with the sums of some rows that a bias before it has for its
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.registry import declare
from rerank_fast.ops.triton import launcher
from rerank_fast.ops.triton.grid import cdiv
from rerank_fast.ops.triton.residual_norm import ROWS
from rerank_fast.ops.triton.variant import Variant

LAUNCH = launcher.Config({"ROWS": ROWS, "COLUMNS": 128, "num_warps": 4, "enable_fp_fusion": True})


@triton.jit
def gelu(x):
    """The exact GELU, x fp32, and its slope."""
    below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit(do_not_specialize=["num_rows"])
def gelu_grad_kernel(
    x,  # (T, width) bf16, fp16 or fp32
    grad,  # (T, width) in x's dtype
    dx,  # out (T, width) in x's dtype
    sums,  # out (programs, width) fp32: over the program's rows
    sums_stride,
    num_rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < num_rows)[:, None] & (e < width)[None, :]
    place = row[:, None] * width + e[None, :]
    _, slope = gelu(tl.load(x + place, mask=there, other=0.0).to(tl.float32))
    result = slope * tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
    tl.store(dx + place, result.to(dx.dtype.element_ty), mask=there)
    tl.store(sums + program * sums_stride + e, tl.sum(result, axis=0), mask=e < width)


@declare("gelu_grad", mutates=("sums",))
def gelu_grad(x: Tensor, grad: Tensor, sums: Tensor) -> Tensor:
    """The gradient of x (T, H), all contiguous; sums (programs, H) fp32 get those of ROWS rows
    each.
    """
    dx = torch.empty_like(x)
    if x.numel() and not x.is_meta:
        grid = sums.shape[0], cdiv(x.shape[1], LAUNCH["COLUMNS"])
        numbers = sums.stride(0), *x.shape
        launcher.launch(gelu_grad_kernel, grid, (x, grad, dx, sums), numbers, LAUNCH)
    return dx


def shipped() -> Iterator[Variant]:
    for name in ("bf16", "fp16", "fp32"):
        types = dict.fromkeys(("x", "grad", "dx"), f"*{name}") | {"sums": "*fp32"}
        types |= dict.fromkeys(["sums_stride", "num_rows", "width"], "i32")
        multiples = [argument for argument in types if argument != "num_rows"]
        yield Variant(f"gelu_grad-{name}", gelu_grad_kernel, types, LAUNCH, multiples=multiples)
