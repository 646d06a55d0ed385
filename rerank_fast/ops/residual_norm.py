"""LayerNorm(residual + dropout(x)): schema -> fake -> backends -> autograd.Function ->
residual_norm().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops.cpu import rows as cpu_rows
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.dropout import check_rows
from rerank_fast.ops.options import check_positive, check_seed, check_share
from rerank_fast.ops.reference import residual_norm as reference
from rerank_fast.ops.reference.residual_norm import HALVES
from rerank_fast.ops.registry import Backend, Backends, Served, declare


def _refuses(takes: str, x: Tensor, residual: Tensor, *, served: bool) -> str:
    if residual.dtype != torch.float32:
        takes = "an fp32 residual"
    elif served:
        return ""
    what = f"x is {x.dtype} on {x.device} of width {x.shape[1]}, residual {residual.dtype}"
    return f"takes {takes}, and {what}"


def _cpu_refusal(x: Tensor, residual: Tensor) -> str:
    served = x.is_cpu and x.dtype in (torch.float32, torch.bfloat16)
    return _refuses("bf16 or fp32 on the CPU", x, residual, served=served)


def _triton_refusal(x: Tensor, residual: Tensor) -> str:
    served = x.dtype in (torch.float32, *HALVES) and x.shape[1] <= 4096
    return _refuses("bf16, fp16 or fp32 of width up to 4096", x, residual, served=served)


def _triton() -> tuple[Callable[..., Any], ...]:
    from rerank_fast.ops.triton import residual_norm

    return residual_norm.forward, residual_norm.backward


_BACKENDS = Backends(
    "residual_norm",
    reference=Served(lambda: (reference.forward, reference.backward)),
    cpu=Served(
        lambda: (cpu_rows.residual_norm_forward, cpu_rows.residual_norm_backward), _cpu_refusal
    ),
    triton=Served(_triton, _triton_refusal),
)


def _fake_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    narrow = x.new_empty(x.shape) if x.dtype in HALVES else residual.new_empty(0)
    rows = residual.new_empty(x.shape[0])
    return residual.new_empty(x.shape), narrow, rows, torch.empty_like(rows)


def _fake_backward(
    x: Tensor, residual: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        residual.new_empty(x.shape),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


@declare("residual_norm", fake=_fake_forward)
def unchecked_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward, _ = _BACKENDS[backend]
    return forward(
        x.contiguous(),
        residual.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        _contiguous(rows),
        eps,
        dropout_p,
        seed,
    )


@declare("residual_norm_backward", fake=_fake_backward)
def unchecked_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, backward = _BACKENDS[backend]
    x, residual, weight = (tensor.contiguous() for tensor in (x, residual, weight))
    optional = (_contiguous(tensor) for tensor in (grad_y, grad_narrow, rows))
    return backward(x, residual, weight, mean, rstd, *optional, eps, dropout_p, seed)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        rows: Tensor | None,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        y, narrow, mean, rstd = unchecked_forward(x, residual, weight, bias, rows, *options)
        # x and residual are alive anyway: the sum and the normalised rows are computed again.
        ctx.save_for_backward(x, residual, weight, mean, rstd, rows)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return y, narrow

    @staticmethod
    @differentiated_once
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_narrow: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, *saved, rows = ctx.saved_tensors
        if x.dtype not in HALVES:
            grad_narrow = None
        grads = unchecked_backward(x, *saved, grad_y, grad_narrow, rows, *ctx.options)
        return *grads, None, None


def backend_for(x: Tensor, residual: Tensor, backend: Backend | None = None) -> str:
    """The backend that serves these; ValueError where the one asked for doesn't."""
    return _BACKENDS.resolve(backend, x, residual)


def residual_norm(
    x: Tensor,  # (T, H)
    residual: Tensor,  # (T, H)
    weight: Tensor,  # (H,)
    bias: Tensor,  # (H,)
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    rows: Tensor | None = None,  # (T,) int32
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm(residual + dropout(x)) over the last dimension, in one pass over memory.

    Args:
        x: (T, H) what a layer adds; bf16, fp32 or, on a GPU, fp16 (any dtype on the reference).
        residual: (T, H) fp32 (fp64 on the reference): the stream it is added to.
        weight: (H,) of the LayerNorm, in the residual's dtype.
        bias: (H,) of the LayerNorm, in the residual's dtype.
        eps: of the LayerNorm, above 0.
        dropout_p: share of x that is dropped.
        seed: chooses which; the same seed drops the same elements, on every backend and in
            backward.
        rows: (T,) int32 numbers that stand for the rows in that choice: some rows of a larger x,
            computed alone, lose what they lost there. None takes 0 to T - 1.
        backend: "cpu" (C++), "triton" (GPUs) or "reference"; None takes the best that can run.

    Returns:
        The result twice: (T, H) in the residual's dtype for the next addition, and in x's dtype for
        the next matrix product; one tensor where the dtypes are the same. Differentiating twice
        raises RuntimeError. A row that holds NaN or an infinity is NaN, and changes no other.

    Raises:
        ValueError: a wrong shape, dtype or option, or a backend that can't run here.
    """
    if x.dim() != 2 or residual.shape != x.shape or x.shape[1] == 0:
        raise ValueError(
            "x and residual must have one shape (T, H) with H of at least 1, "
            f"got {tuple(x.shape)} and {tuple(residual.shape)}"
        )
    if weight.shape != x.shape[1:] or bias.shape != x.shape[1:]:
        raise ValueError(
            f"weight and bias must have the shape ({x.shape[1]},), got {tuple(weight.shape)}, "
            f"{tuple(bias.shape)}"
        )
    if not residual.dtype == weight.dtype == bias.dtype or residual.dtype not in (
        torch.float32,
        torch.float64,
    ):
        raise ValueError(
            "residual, weight and bias must all be fp32 or all fp64, "
            f"got {residual.dtype}, {weight.dtype} and {bias.dtype}"
        )
    options = (check_positive("eps", eps), check_share("dropout_p", dropout_p), check_seed(seed))
    check_rows(rows, x)
    rows = rows if dropout_p > 0 else None
    resolved = backend_for(x, residual, backend)
    y, narrow = _ResidualNorm.apply(x, residual, weight, bias, rows, (*options, resolved))
    return y, narrow if x.dtype in HALVES else y
