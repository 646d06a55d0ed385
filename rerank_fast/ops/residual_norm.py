"""LayerNorm(residual + dropout(x)): schema -> fake -> backends -> autograd.Function ->
residual_norm().
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops import backends, cpu
from rerank_fast.ops.attention_reference import check_rows, dropout_factors
from rerank_fast.ops.backends import Backend
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.options import check_positive, check_seed, check_share

_HALVES = (torch.bfloat16, torch.float16)  # what the second result comes in; x in fp32 needs none

_LIBRARY = torch.library.Library("rerank_fast", "FRAGMENT")
_OPTIONS = "float eps, float dropout_p, SymInt seed, str backend"
_LIBRARY.define(
    "residual_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? rows, "
    f"{_OPTIONS}) -> (Tensor y, Tensor narrow, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "residual_norm_backward(Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd, "
    f"Tensor? grad_y, Tensor? grad_narrow, Tensor? rows, {_OPTIONS}) -> (Tensor dx, Tensor "
    "dresidual, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("rerank_fast::residual_norm", lib=_LIBRARY)
def _fake_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    narrow = x.new_empty(x.shape) if x.dtype in _HALVES else residual.new_empty(0)
    rows = residual.new_empty(x.shape[0])
    return residual.new_empty(x.shape), narrow, rows, torch.empty_like(rows)


@torch.library.register_fake("rerank_fast::residual_norm_backward", lib=_LIBRARY)
def _fake_backward(
    x: Tensor, residual: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        residual.new_empty(x.shape),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


def _dropped(
    x: Tensor, residual: Tensor, rows: Tensor | None, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor | None]:
    """residual + dropout(x), and the factors of the dropout."""
    if dropout_p == 0:
        return residual + x.to(residual.dtype), None
    rows = torch.arange(x.shape[0], device=x.device) if rows is None else rows
    factors = dropout_factors(seed, 0, rows, x.shape[1], dropout_p).to(residual.dtype)
    return residual + factors * x.to(residual.dtype), factors


def _reference_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification, any dtype."""
    total, _ = _dropped(x, residual, rows, dropout_p, seed)
    mean = total.mean(dim=1)
    rstd = (total.var(dim=1, unbiased=False) + eps).rsqrt()
    y = (total - mean[:, None]) * rstd[:, None] * weight + bias
    return y, y.to(x.dtype) if x.dtype in _HALVES else y.new_empty(0), mean, rstd


def _reference_backward(
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
    total, factors = _dropped(x, residual, rows, dropout_p, seed)
    unit = (total - mean[:, None]) * rstd[:, None]
    grads = [grad.to(residual.dtype) for grad in (grad_y, grad_narrow) if grad is not None]
    grad = torch.stack(grads).sum(dim=0) if grads else torch.zeros_like(residual)
    weighted = grad * weight
    along = (weighted * unit).mean(dim=1, keepdim=True)
    d_total = rstd[:, None] * (weighted - weighted.mean(dim=1, keepdim=True) - unit * along)
    dx = d_total.clone() if factors is None else d_total * factors
    return dx.to(x.dtype), d_total, (grad * unit).sum(dim=0), grad.sum(dim=0)


def _forward(
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
    forward = {"cpu": cpu.residual_norm_forward, "reference": _reference_forward}.get(backend)
    forward = forward or _triton().forward
    tensors = (tensor.contiguous() for tensor in (x, residual, weight, bias))
    return forward(*tensors, _contiguous(rows), eps, dropout_p, seed)  # type: ignore[call-arg, arg-type]


def _backward(
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
    backward = {"cpu": cpu.residual_norm_backward, "reference": _reference_backward}.get(backend)
    backward = backward or _triton().backward
    x, residual, weight = (tensor.contiguous() for tensor in (x, residual, weight))
    optional = (_contiguous(tensor) for tensor in (grad_y, grad_narrow, rows))
    return backward(x, residual, weight, mean, rstd, *optional, eps, dropout_p, seed)  # type: ignore[call-arg, arg-type]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


_LIBRARY.impl("residual_norm", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("residual_norm_backward", _backward, "CompositeExplicitAutograd")


def unchecked_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op for a caller that keeps its contract, outside of tracing: only meta tensors take the
    dispatcher's way.

    Arguments are those of its schema, of which rows is None without dropout.
    """
    return (torch.ops.rerank_fast.residual_norm.default if x.is_meta else _forward)(x, *rest)


def unchecked_backward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As unchecked_forward; grad_narrow is None where x is not narrow."""
    return (torch.ops.rerank_fast.residual_norm_backward.default if x.is_meta else _backward)(
        x, *rest
    )


def _triton() -> ModuleType:
    from rerank_fast.ops.triton import residual_norm as kernels

    return kernels


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
        y, narrow, mean, rstd = torch.ops.rerank_fast.residual_norm.default(
            x, residual, weight, bias, rows, *options
        )
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
        if x.dtype not in _HALVES:
            grad_narrow = None
        grads = torch.ops.rerank_fast.residual_norm_backward.default(
            x, *saved, grad_y, grad_narrow, rows, *ctx.options
        )
        return *grads, None, None


def _unserved(backend: str, x: Tensor, residual: Tensor) -> str:
    """Why a backend doesn't take this; empty where it does."""
    if residual.dtype != torch.float32:
        takes = "an fp32 residual"
    elif backend == "cpu":
        if x.is_cpu and x.dtype in (torch.float32, torch.bfloat16):
            return ""
        takes = "bf16 or fp32 on the CPU"
    else:
        if x.dtype in (torch.float32, *_HALVES) and x.shape[1] <= 4096:
            return ""
        takes = "bf16, fp16 or fp32 of width up to 4096"
    what = f"x is {x.dtype} on {x.device} of width {x.shape[1]}, residual {residual.dtype}"
    return f"takes {takes}, and {what}"


def backend_for(x: Tensor, residual: Tensor, backend: Backend | None = None) -> str:
    """The backend that serves these; ValueError where the one asked for doesn't."""
    return backends.resolve(
        "residual_norm", backend, x, unserved=partial(_unserved, x=x, residual=residual)
    )


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
    return y, narrow if x.dtype in _HALVES else y
