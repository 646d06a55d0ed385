"""The kernels between the products of a pre-norm layer, of either backend: what stands in the row
that a layer calls, forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class PreNormKernels:
    """Of one backend; ops/cpu/pre_norm.py says what each computes."""

    backend: Literal["cpu", "triton"]
    add_norm: Callable[..., Any]
    add_norm_grads: Callable[..., Any]
    programs: Callable[[int], int]
    rotary: Callable[..., None]
    rotary_grad: Callable[..., Any]
    gated: Callable[..., Any]
    gated_grad: Callable[..., Any]
    column_sums: Callable[..., Any]


@functools.cache
def kernels_of(backend: Literal["cpu", "triton"]) -> PreNormKernels:
    """A backend's; its modules are imported when it is first asked for."""
    if backend == "cpu":
        from rerank_fast.ops.cpu import pre_norm as cpu

        return PreNormKernels(
            backend,
            cpu.add_norm,
            cpu.add_norm_grads,
            cpu.programs,
            cpu.rotary,
            cpu.rotary_grad,
            cpu.gated,
            cpu.gated_grad,
            cpu.column_sums,
        )
    from rerank_fast.ops.triton import add_norm, column_sums, gated, residual_norm, rotary

    return PreNormKernels(
        backend,
        add_norm.add_norm,
        add_norm.add_norm_grads,
        residual_norm.programs,
        rotary.rotary,
        rotary.rotary_grad,
        gated.gated,
        gated.gated_grad,
        column_sums.column_sums,
    )
