"""A gated feed-forward's activation(gate) * up in Triton, and its gradient: one pass over memory
each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops.registry import declare
from rerank_fast.ops.triton import guard, launcher
from rerank_fast.ops.triton.gelu import gelu
from rerank_fast.ops.triton.grid import cdiv
from rerank_fast.ops.triton.variant import Variant

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
# Without the limit the gradient of the exact GELU spills on sm_100, of no more registers.
LAUNCH = launcher.Config(
    guard.for_vendor({"COLUMNS": 1024, "num_warps": 4, "maxnreg": 64, "enable_fp_fusion": True})
)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation and its slope."""
    if ACTIVATION == "gelu":
        y, slope = gelu(x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2 u.
        share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        y = x * share
        slope = share + y * (1.0 - share) * (1.5957691216057308 + 0.21406444881780076 * x * x)
    else:
        share = 1.0 / (1.0 + tl.exp(-x))
        y = x * share
        slope = share * (1.0 + x - y)
    return y, slope


@triton.jit
def gated_kernel(gate_up, out, width, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr):
    """A part of a row: gate_up (T, 2 x width), the gates first, to out (T, width)."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = e < width
    gate = tl.load(gate_up + row * 2 * width + e, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + e, mask=there, other=0.0).to(tl.float32)
    active, _ = _activate(gate, ACTIVATION)
    tl.store(out + row * width + e, (active * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def gated_grad_kernel(
    gate_up, grad, d_gate_up, width, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = e < width
    first = row * 2 * width + e
    gate = tl.load(gate_up + first, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + first + width, mask=there, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * width + e, mask=there, other=0.0).to(tl.float32)
    active, slope = _activate(gate, ACTIVATION)
    tl.store(d_gate_up + first, (upstream * up * slope).to(d_gate_up.dtype.element_ty), mask=there)
    tl.store(
        d_gate_up + first + width, (upstream * active).to(d_gate_up.dtype.element_ty), mask=there
    )


@declare("gated")
def gated(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of (T, 2 I) gates and what they are multiplied with, contiguous: (T,
    I).
    """
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), width)
    if out.numel() and not out.is_meta:
        grid = len(out), cdiv(width, LAUNCH["COLUMNS"])
        of = launcher.constants(ACTIVATION=activation)
        launcher.launch(gated_kernel, grid, (gate_up, out), (width,), of, LAUNCH)
    return out


@declare("gated_grad")
def gated_grad(gate_up: Tensor, grad: Tensor, activation: str) -> Tensor:
    """The gradient of gate_up (T, 2 I) from that of the result (T, I)."""
    result = torch.empty_like(gate_up)
    if grad.numel() and not grad.is_meta:
        width = grad.shape[1]
        grid = len(grad), cdiv(width, LAUNCH["COLUMNS"])
        tensors = (gate_up, grad, result)
        of = launcher.constants(ACTIVATION=activation)
        launcher.launch(gated_grad_kernel, grid, tensors, (width,), of, LAUNCH)
    return result


def shipped() -> Iterator[Variant]:
    for name in ("bf16", "fp16", "fp32"):
        for activation in ACTIVATIONS:
            for kernel in (gated_kernel, gated_grad_kernel):
                types = {one: "i32" if one == "width" else f"*{name}" for one in kernel.arg_names}
                constants = {"ACTIVATION": activation}
                yield Variant(
                    f"{kernel.__name__}-{name}_{activation}", kernel, types, LAUNCH, constants
                )
