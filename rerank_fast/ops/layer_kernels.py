"""The kernels between the products of a layer that is one function: sums with norms, rotary
positions and gates, of either backend, forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rerank_fast.ops.cpu import pre_norm as cpu
from rerank_fast.ops.registry import HAS_TRITON


@dataclass(frozen=True)
class LayerKernels:
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
def kernels_of(backend: Literal["cpu", "triton"]) -> LayerKernels:
    """A backend's; its modules are imported when it is first asked for."""
    if backend == "cpu":
        return LayerKernels(
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

    return LayerKernels(
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


def triton_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's run on a device; a meta tensor stands for a GPU's."""
    on_gpu = device.type in ("cuda", "meta")
    return on_gpu and HAS_TRITON and dtype.itemsize <= torch.float32.itemsize


def kernels_for(device: torch.device, dtype: torch.dtype) -> LayerKernels | None:
    """Those that run there; None where none do."""
    if triton_serves(device, dtype):
        return kernels_of("triton")
    return kernels_of("cpu") if cpu.serves(device, dtype) else None
