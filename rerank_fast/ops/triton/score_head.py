"""The score head in Triton: one launch, whatever the shape; its gradients are in
score_head_backward.py.

A program owns a block of rows and takes the dense product column block by column block: no product
is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.choices import Activation
from rerank_fast.ops.triton import autotune, dropout, guard, launcher
from rerank_fast.ops.triton.grid import cdiv
from rerank_fast.ops.triton.variant import Variant

# Of the dropout after the activation, and of the one before the dense layer.
STREAM, IN_STREAM = tl.constexpr(0), tl.constexpr(1)
DTYPES: Any = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Rows, columns of the dense product, and how much of its sum is taken at once. 16-bit products go
# to tensor cores; fp32 ones are fused multiply-adds in registers.
LAUNCH = launcher.Config(
    {
        "ROWS": 16,
        "COLUMNS": 64,
        "INNER": 32,
        "num_warps": 8,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }
)
LAUNCH_FP32 = launcher.Config(LAUNCH | {"INNER": 16, "num_stages": 2})
CASE = ("D", "H", "ACTIVATION", "DROP", "DROP_IN")
# What tuning tries beside them. ROWS stay: backward's buffers are of their size.
AROUND: tuple[dict[str, Any], ...] = (
    {"num_warps": 4},
    {"COLUMNS": 128},
    {"INNER": 64},
    {"num_stages": 4},
)


@triton.jit
def _tanh(x):
    a = tl.abs(x)
    a2 = a * a
    t = tl.exp(-2.0 * a)
    # Near 0, where 1 - t cancels, an odd polynomial.
    p = a2 * -0.00628366228 + 0.0211214516
    p = p * a2 - 0.053876318
    p = p * a2 + 0.133329332
    p = p * a2 - 0.333333313
    y = tl.where(a < 0.6, a + a * (a2 * p), (1.0 - t) / (1.0 + t))
    return tl.where(x < 0.0, -y, y)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation and its slope."""
    if ACTIVATION == "tanh":
        y = _tanh(x)
        slope = 1.0 - y * y
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        y = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "relu":
        y = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        y = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return y, slope


@triton.jit
def span(first, size, BLOCK: tl.constexpr):
    """BLOCK places from first on, and which of them there are."""
    place = first + tl.arange(0, BLOCK)
    return place, place < size


@triton.jit
def load_tile(matrix, stride, row, in_rows, column, in_columns):
    """(rows, columns) of a matrix; 0 where nothing is."""
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(matrix + place, mask=in_rows[:, None] & in_columns[None, :], other=0.0)


@triton.jit
def places(source, row, in_rows):
    """Which rows of hidden are read, and which there are: an index that names none reads
    nothing.
    """
    _, _, num_hidden, index, _, _, _ = source
    place = row.to(tl.int64)
    if index is not None:
        place = tl.load(index + row, mask=in_rows, other=0).to(tl.int64)
        in_rows = in_rows & (place >= 0) & (place < num_hidden)
    return place, in_rows


@triton.jit
def load_x(source, row, in_rows, column, in_columns, DROP_IN: tl.constexpr):
    """(rows, columns) of the rows that are read, dropped out, in their own dtype.

    source: hidden, the stride and number of its rows, index or None, and the dropout's seed,
        threshold and rescale.
    """
    hidden, stride, _, _, seed, threshold, rescale = source
    place, there = places(source, row, in_rows)
    x = load_tile(hidden, stride, place, there, column, in_columns)
    if DROP_IN:
        kept = dropout.tile_factors(seed, IN_STREAM, row, column, threshold, rescale)
        x = (x.to(tl.float32) * kept).to(x.dtype)
    return x


@triton.jit
def dense_tile(
    source,  # as in load_x
    weight,
    bias,
    row,
    in_rows,
    out,
    in_out,
    H,
    dot_dtype: tl.constexpr,
    DROP_IN: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile of the dense layer's result, fp32."""
    total = tl.zeros([row.shape[0], out.shape[0]], tl.float32)
    for first in range(0, H, INNER):
        e, in_e = span(first, H, INNER)
        x = load_x(source, row, in_rows, e, in_e, DROP_IN)
        place = (
            out.to(tl.int64)[None, :] * H + e[:, None]
        )  # a transposed tile would cost 16 registers
        w = tl.load(weight + place, mask=in_e[:, None] & in_out[None, :], other=0.0)
        total = tl.dot(x.to(dot_dtype), w.to(dot_dtype), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + out, mask=in_out, other=0.0).to(tl.float32)[None, :]
    return total


NOT_SPECIALIZED = ["n", "num_hidden", "seed", "threshold", "rescale", "threshold_in", "rescale_in"]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    hidden,  # (T, H)
    index,  # (N,) int32 or int64, or None
    dense_weight,  # (D, H)
    dense_bias,  # (D,) or None
    out_weight,  # (D,)
    out_bias,  # (1,) or None
    scores,  # out (N,) fp32
    stride,  # of the rows of hidden
    num_hidden,  # T
    n,
    D,
    H,
    seed,
    threshold,
    rescale,
    threshold_in,
    rescale_in,
    dot_dtype: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    DROP_IN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The scores of a block of rows; NaN where the index names none."""
    source = (hidden, stride, num_hidden, index, seed, threshold_in, rescale_in)
    row, in_rows = span(tl.program_id(0) * ROWS, n, ROWS)
    score = tl.zeros([ROWS], tl.float32)
    for first in range(0, D, COLUMNS):
        out, in_out = span(first, D, COLUMNS)
        dense = dense_tile(
            source,
            dense_weight,
            dense_bias,
            row,
            in_rows,
            out,
            in_out,
            H,
            dot_dtype,
            DROP_IN,
            INNER,
        )
        active, _ = activate(dense, ACTIVATION)
        if DROP:
            active *= dropout.tile_factors(seed, STREAM, row, out, threshold, rescale)
        w = tl.load(out_weight + out, mask=in_out, other=0.0).to(tl.float32)
        # Beyond D a product of infinity with 0 is NaN.
        score += tl.sum(tl.where(in_out[None, :], active * w[None, :], 0.0), axis=1)
    if out_bias is not None:
        score += tl.load(out_bias).to(tl.float32)
    if index is not None:
        _, there = places(source, row, in_rows)
        score = tl.where(there, score, float("nan"))
    tl.store(scores + row, score, mask=in_rows)


def split(
    hidden: Tensor, options: tuple[Any, ...]
) -> tuple[int, list[Any], list[Any], launcher.Config]:
    """The mixed seed, (threshold, rescale) of both dropouts, and the constexprs that follow from
    the options.
    """
    activation, dropout_p, dropout_in_p, seed = options
    # The interpreter would multiply bf16 as integers; products of bf16 are exact in fp32.
    widened = hidden.dtype == torch.bfloat16 and guard.interpreted()
    flags = launcher.constants(
        dot_dtype=tl.float32 if widened else DTYPES[hidden.dtype],
        ACTIVATION=activation,
        DROP=dropout_p > 0,
        DROP_IN=dropout_in_p > 0,
    )
    mixed, *after = dropout.scalars(dropout_p, seed)
    _, *before = dropout.scalars(dropout_in_p, seed)
    return mixed, after, before, flags


def forward(
    hidden: Tensor,  # (T, H) fp32, bf16 or fp16, each row one run of memory
    index: Tensor | None,  # (N,)
    dense_weight: Tensor,  # (D, H)
    dense_bias: Tensor | None,  # (D,)
    out_weight: Tensor,  # (1, D)
    out_bias: Tensor | None,  # (1,)
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The backend contract: the scores (N,) fp32, and nothing for backward. Raises ValueError for
    CPU tensors outside the interpreter.
    """
    guard.require_gpu(hidden)
    index = None if index is None else index.contiguous()
    n = hidden.shape[0] if index is None else index.shape[0]
    scores = torch.empty(n, dtype=torch.float32, device=hidden.device)
    seed, after, before, flags = split(hidden, options)
    launch = LAUNCH_FP32 if hidden.dtype == torch.float32 else LAUNCH
    if n:
        kernel, rest = autotune.choose(forward_kernel, launch, AROUND, CASE)
        launcher.launch(
            kernel,
            (cdiv(n, launch["ROWS"]),),
            (hidden, index, dense_weight, dense_bias, out_weight, out_bias, scores),
            (hidden.stride(0), hidden.shape[0], n, *dense_weight.shape, seed, *after, *before),
            flags,
            rest,
        )
    return scores, hidden.new_empty(0)


def variants(
    name: str,
    kernel: Any,
    launch: dict[str, Any],
    launch_fp32: dict[str, Any],
    launch_fp32_dropout: dict[str, Any] | None = None,  # None: launch_fp32
) -> Iterator[Variant]:
    """Every dtype and activation, with neither gather nor dropout, with both, and, as packed
    execution trains, with dropout alone."""
    numbers = [
        "stride",
        "num_hidden",
        "n",
        "D",
        "H",
        "num_parts",
        "seed",
        "threshold",
        "threshold_in",
    ]
    types = dict.fromkeys(numbers, "i32")
    types |= {"rescale": "fp32", "rescale_in": "fp32"}
    types |= dict.fromkeys(["scores", "grad_scores", "bias_parts", "out_parts"], "*fp32") | {
        "index": "*i64"
    }
    for dtype in DTYPES.values():
        for activation in get_args(Activation):
            for gathers, drops in ((False, False), (True, True), (False, True)):
                if activation != "tanh" and (drops or name == "grads"):
                    continue  # the activation shows in one of them
                constants = {
                    "dot_dtype": dtype,
                    "ACTIVATION": activation,
                    "DROP": drops,
                    "DROP_IN": drops,
                }
                constants = {
                    key: value for key, value in constants.items() if key in kernel.arg_names
                }
                yield Variant(
                    f"score_head-{name}_{dtype}_{activation}"
                    f"{'_gather' * gathers}{'_dropout' * drops}",
                    kernel,
                    {argument: types.get(argument, f"*{dtype}") for argument in kernel.arg_names},
                    launch
                    if dtype != tl.float32
                    else (drops and launch_fp32_dropout) or launch_fp32,
                    constants if gathers else constants | {"index": None},
                )


def shipped() -> Iterator[Variant]:
    return variants("forward", forward_kernel, LAUNCH, LAUNCH_FP32)
