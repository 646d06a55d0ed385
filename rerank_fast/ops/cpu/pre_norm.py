"""What stands between the products of a layer that norms first, has rotary positions or a gate,
through the C++ kernels: no graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops.cpu import address, available, compiled
from rerank_fast.ops.registry import declare


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows of a dtype on a device are theirs."""
    return available() and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def programs(num_rows: int) -> int:
    """Rows of sums that a backward leaves of so many rows."""
    return -(-num_rows // int(compiled().PRE_NORM_ROWS_PER_TASK))


def _add_norm_shape(
    rows: Tensor, dtype: torch.dtype, eps: float, x_eps: float, *, centered: bool
) -> Any:
    return compiled().AddNormShape(
        rows=rows.shape[0],
        width=rows.shape[1],
        bf16=dtype == torch.bfloat16,
        centered=centered,
        eps=eps,
        x_eps=x_eps,
        num_threads=torch.get_num_threads(),
    )


@declare("cpu_add_norm")
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
    """residual + x, or residual + RMSNorm(x), and the norm of the sum.

    Args:
        residual: (T, H) fp32.
        x: (T, H) what is added, in dtype; None where nothing is, and the first result is then
            empty.
        weight: (H,) fp32 of the norm.
        bias: (H,) fp32 or None.
        eps: of the norm.
        centered: LayerNorm; else RMSNorm, whose mean is empty.
        dtype: of the norm's result: fp32 or bf16.
        x_weight: (H,) fp32 of the norm of x; None without x, and where it is added as it is.
        x_eps: of the norm of x.

    Returns:
        (T, H) fp32 sum, (T, H) norm, (T,) fp32 mean and reciprocal of the deviation, and of x's
        norm, empty without.
    """
    residual, x = residual.contiguous(), None if x is None else x.to(dtype).contiguous()
    total = residual.new_empty(residual.shape if x is not None else 0)
    normed = residual.new_empty(residual.shape, dtype=dtype)
    mean = residual.new_empty(len(residual) if centered else 0)
    rstd = residual.new_empty(len(residual))
    x_rstd = residual.new_empty(0 if x_weight is None else len(residual))
    if not residual.is_meta:
        shape = _add_norm_shape(residual, dtype, eps, x_eps, centered=centered)
        taken, given = (residual, x, x_weight, weight, bias), (total, normed, mean, rstd, x_rstd)
        compiled().add_norm_forward(shape, *map(address, (*taken, *given)))
    return total, normed, mean, rstd, x_rstd


@declare("cpu_add_norm_grads", mutates=("sums",))
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
    total, grad_normed = total.contiguous(), grad_normed.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    x = None if x is None else x.to(grad_normed.dtype).contiguous()
    grad_x = grad_normed.new_empty(total.shape if has_x else 0)
    d_residual = torch.empty_like(total)
    if not total.is_meta:
        shape = _add_norm_shape(total, grad_normed.dtype, 0.0, 0.0, centered=mean.numel() > 0)
        taken = (total, weight, mean, rstd, x, x_weight, x_rstd, grad_normed, grad_total)
        given = (grad_x if has_x else None, d_residual, sums)
        compiled().add_norm_backward(shape, *map(address, (*taken, *given)))
    return grad_x, d_residual


def _rotary_shape(x: Tensor, other: Tensor | None, num_queries: int, eps: float) -> Any:
    num_tokens, num_heads, head_size = x.shape
    return compiled().RotaryShape(
        rows=num_tokens,
        heads=num_heads,
        num_queries=num_queries,
        head_size=head_size,
        stride=x.stride(0),
        other_stride=0 if other is None else other.stride(0),
        bf16=x.dtype == torch.bfloat16,
        eps=eps,
        num_threads=torch.get_num_threads(),
    )


@declare("cpu_rotary", mutates=("out",))
def rotary(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor | None,
    num_queries: int,
    eps: float,
) -> None:
    """Norm and rotation of the heads of x, to where out lies: it may be x itself.

    Args:
        x: (T, heads, head size) queries and then keys, heads contiguous.
        out: like x.
        cos: (T, head size) fp32.
        sin: (T, head size) fp32.
        weights: (2 x head size,) fp32 of the queries' RMSNorm, then of the keys'; None: no norms.
        num_queries: how many of the heads are queries.
        eps: of the norms.
    """
    if not x.is_meta:
        tensors = (x, out, cos.contiguous(), sin.contiguous(), weights)
        shape = _rotary_shape(x, out, num_queries, eps)
        compiled().rotary_forward(shape, *map(address, tensors))


@declare("cpu_rotary_grad", mutates=("grad",))
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
    count = 0 if weights is None else programs(len(grad))
    sums = cos.new_empty(count, 2 * grad.shape[2])
    if not grad.is_meta:
        tensors = (grad, x, cos.contiguous(), sin.contiguous(), weights, sums)
        compiled().rotary_backward(_rotary_shape(grad, x, num_queries, eps), *map(address, tensors))
    return sums


def _gated_shape(out: Tensor, activation: str) -> Any:
    return compiled().GatedShape(
        rows=out.shape[0],
        width=out.shape[1],
        bf16=out.dtype == torch.bfloat16,
        gate=activation,
        num_threads=torch.get_num_threads(),
    )


@declare("cpu_gated")
def gated(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of (T, 2 I) gates and what they are multiplied with: (T, I)."""
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    if not out.is_meta:
        compiled().gated_forward(_gated_shape(out, activation), *map(address, (gate_up, out)))
    return out


@declare("cpu_gated_grad")
def gated_grad(gate_up: Tensor, grad: Tensor, activation: str) -> Tensor:
    """The gradient of gate_up (T, 2 I) from that of the result (T, I)."""
    gate_up, grad = gate_up.contiguous(), grad.contiguous()
    result = torch.empty_like(gate_up)
    if not grad.is_meta:
        tensors = (gate_up, grad, result)
        compiled().gated_backward(_gated_shape(grad, activation), *map(address, tensors))
    return result


def column_sums(a: Tensor, b: Tensor | None, c: Tensor | None) -> Tensor:
    """The sums over the rows of fp32 matrices, one after the other."""
    return torch.cat([one.sum(0) for one in (a, b, c) if one is not None])
