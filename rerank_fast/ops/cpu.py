"""The CPU backend: hands tensors' addresses to the compiled kernels in csrc/."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rerank_fast.ops import ragged

try:
    import rerank_fast._C as _compiled
except ImportError as error:
    _C: Any = None
    _reason = str(error)
else:
    _C, _reason = _compiled, ""

_SCALES = {"binary": 1 / math.log(2), "natural": 1.0}


def available() -> bool:
    """Whether the compiled module is there."""
    return _C is not None


def compiled() -> Any:
    """The compiled module."""
    return _C


def unavailable_reason() -> str:
    """What is missing and how to get it."""
    return (
        f"the compiled module rerank_fast._C is missing ({_reason}). Install a C++17 compiler "
        "(Debian and Ubuntu: apt-get install g++) and run: pip install --force-reinstall --no-deps "
        "-e ."
    )


def instruction_sets() -> list[str]:
    """Those that the kernels were built for and that this processor has, widest first.

    Of x86-64 sse4, avx2, avx512, avx512_bf16 and amx_bf16; of 64-bit Arm neon and neon_bf16.
    amx_bf16 is AVX-512 with bf16 whose attention multiplies bf16 in tiles: Linux has to permit the
    process to use them.
    """
    return _C.instruction_sets() if available() else []


def instruction_set() -> str:
    """The one whose kernels run."""
    return _C.instruction_set()


def choose_instruction_set(name: str) -> None:
    """Run another one's kernels from now on, in the whole process; for tests and measuring.

    RERANK_FAST_ISA names it from outside. Not while a kernel runs in another thread.

    Raises:
        ValueError: it is none of instruction_sets().
    """
    if name not in instruction_sets():
        here = ", ".join(instruction_sets()) or "none: there is no compiled module"
        raise ValueError(
            f"instruction set (RERANK_FAST_ISA) must be one that this machine has ({here}), got "
            f"{name!r}"
        )
    _C.choose_instruction_set(name)


if available() and not instruction_sets():
    _C, _reason = None, "this processor has none of the instruction sets that it was built for"
if available() and os.environ.get("RERANK_FAST_ISA"):
    choose_instruction_set(os.environ["RERANK_FAST_ISA"])


@functools.lru_cache(maxsize=64)
def _lambda_loss_options(
    scheme: str,
    k: int,
    sigma: float,
    mu: float,
    eps: float,
    reduction_log: str,
    reduction: str,
    num_threads: int,
) -> Any:
    scale = _SCALES[reduction_log]
    return _C.LambdaLossOptions(
        scheme=scheme,
        k=k,
        sigma=sigma,
        mu=mu,
        eps=eps,
        scale=scale,
        reduction=reduction,
        num_threads=num_threads,
    )


def lambda_loss_forward(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
    *,
    scheme: str,
    k: int,
    sigma: float,
    mu: float,
    eps: float,
    reduction_log: str,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend contract: see reference/lambda_loss.py."""
    if scores.dtype == torch.float32:
        kernel = _C.lambda_loss_float
    elif scores.dtype == torch.float64:
        kernel = _C.lambda_loss_double
    else:
        scores, kernel = scores.float(), _C.lambda_loss_float
    num_lists = offsets.shape[0] - 1
    loss = scores.new_empty((num_lists,) if reduction == "none" else ())
    grad, pairs = torch.empty_like(scores), offsets.new_empty(())
    threads = torch.get_num_threads()
    done = kernel(
        _lambda_loss_options(scheme, k, sigma, mu, eps, reduction_log, reduction, threads),
        scores.data_ptr(),
        labels.data_ptr(),
        offsets.data_ptr(),
        scores.shape[0],
        num_lists,
        loss.data_ptr(),
        grad.data_ptr(),
        pairs.data_ptr(),
    )
    if not done:
        ragged.check_offsets(offsets, scores.shape[0])  # which says what is wrong
    return loss, grad, pairs


def address(tensor: Tensor | None) -> int:
    """Of its data; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(tensor: Tensor | None) -> Any:
    """(tokens, heads, head_size) as the kernels take it; None has no data."""
    if tensor is None:
        return _C.Rows(0, 0, 0)
    return _C.Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def attention_shape(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    options: tuple[Any, ...],
) -> Any:
    """scale, window_left, window_right, dropout_p and seed are the options."""
    scale, window_left, window_right, dropout_p, seed = options
    return _C.AttentionShape(
        num_sequences=cu_seqlens_q.shape[0] - 1,
        num_queries=q.shape[0],
        num_keys=k.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_size=q.shape[2],
        cu_seqlens_q=cu_seqlens_q.data_ptr(),
        cu_seqlens_k=cu_seqlens_k.data_ptr(),
        dropout_rows=address(rows),
        bf16=q.dtype == torch.bfloat16,
        scale=scale,
        window_left=window_left,
        window_right=window_right,
        dropout_p=dropout_p,
        seed=seed,
        num_threads=torch.get_num_threads(),
    )


def refuse_ends(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Says which of them the kernel refused, and why."""
    ragged.check_ends("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    ragged.check_ends("cu_seqlens_k", cu_seqlens_k, k.shape[0])


def varlen_attention_forward(
    q: Tensor,  # (Tq, heads, head_size)
    k: Tensor,  # (Tk, kv_heads, head_size)
    v: Tensor,  # (Tk, kv_heads, head_size)
    cu_seqlens_q: Tensor,  # (N + 1,) int32
    cu_seqlens_k: Tensor,  # (N + 1,) int32
    rows: Tensor | None,  # (Tq,) int32
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The backend contract: out (Tq, heads, head_size), and lse (heads, Tq) fp32 for backward."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    shape = attention_shape(q, k, cu_seqlens_q, cu_seqlens_k, rows, options)
    if not _C.attention_forward(
        shape, rows_of(q), rows_of(k), rows_of(v), rows_of(out), lse.data_ptr()
    ):
        refuse_ends(q, k, cu_seqlens_q, cu_seqlens_k)
    return out, lse


def varlen_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rows: Tensor | None,
    *options: Any,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of q, k and v, written to `into` where it is given."""
    dq, dk, dv = into or tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (q, k, v)
    )
    shape = attention_shape(q, k, cu_seqlens_q, cu_seqlens_k, rows, options)
    forward = (rows_of(q), rows_of(k), rows_of(v), rows_of(out), lse.data_ptr())
    if not _C.attention_backward(
        shape, *forward, rows_of(grad_out), rows_of(dq), rows_of(dk), rows_of(dv)
    ):
        refuse_ends(q, k, cu_seqlens_q, cu_seqlens_k)
    return dq, dk, dv


def _norm_shape(x: Tensor, rows: Tensor | None, eps: float, dropout_p: float, seed: int) -> Any:
    return _C.ResidualNormShape(
        rows=x.shape[0],
        width=x.shape[1],
        dropout_rows=address(rows),
        bf16=x.dtype == torch.bfloat16,
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
        num_threads=torch.get_num_threads(),
    )


def residual_norm_forward(
    x: Tensor,  # (T, H) bf16 or fp32
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
    y = torch.empty_like(residual)
    narrow = torch.empty_like(x) if x.dtype == torch.bfloat16 else y.new_empty(0)
    mean, rstd = residual.new_empty(x.shape[0]), residual.new_empty(x.shape[0])
    tensors = (x, residual, weight, bias, y, narrow, mean, rstd)
    shape = _norm_shape(x, rows, eps, dropout_p, seed)
    _C.residual_norm_forward(shape, *(tensor.data_ptr() for tensor in tensors))
    return y, narrow, mean, rstd


def residual_norm_backward(
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
    grads = (
        torch.empty_like(x),
        torch.empty_like(residual),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )
    incoming = (address(grad) for grad in (grad_y, grad_narrow))
    forward = (tensor.data_ptr() for tensor in (x, residual, weight, mean, rstd))
    outgoing = (tensor.data_ptr() for tensor in grads)
    shape = _norm_shape(x, rows, eps, dropout_p, seed)
    _C.residual_norm_backward(shape, *forward, *incoming, *outgoing)
    return grads


def _head_rows(
    hidden: Tensor, index: Tensor | None, dense_weight: Tensor, options: tuple[Any, ...]
) -> tuple[Any, Tensor]:
    """The kernels' shape, and the rows that are read, dropped out; fp16 becomes fp32, which
    processors multiply.
    """
    activation, dropout_p, dropout_in_p, seed = options
    if hidden.dtype == torch.float16:
        hidden, index = (hidden if index is None else hidden[index]).float(), None
    num_rows = hidden.shape[0] if index is None else index.shape[0]
    shape = _C.ScoreHeadShape(
        rows=num_rows,
        hidden=hidden.shape[1],
        width=dense_weight.shape[0],
        bf16=hidden.dtype == torch.bfloat16,
        activation=activation,
        dropout_p=dropout_p,
        dropout_in_p=dropout_in_p,
        seed=seed,
        num_threads=torch.get_num_threads(),
    )
    if index is None and dropout_in_p == 0:
        return shape, hidden
    index = None if index is None else index.long().contiguous()
    x = hidden.new_empty(num_rows, hidden.shape[1])
    source = (hidden.data_ptr(), hidden.stride(0), hidden.shape[0])
    _C.score_head_gather(shape, *source, address(index), x.data_ptr())
    return shape, x


def score_head_forward(
    hidden: Tensor,  # (T, H) fp32, bf16 or fp16, each row one run of memory
    index: Tensor | None,  # (N,)
    dense_weight: Tensor,  # (D, H)
    dense_bias: Tensor | None,  # (D,)
    out_weight: Tensor,  # (1, D)
    out_bias: Tensor | None,  # (1,)
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The backend contract: the scores (N,) fp32; and the dense layer's result (N, D) for backward.

    A third matrix product would cost more than these few rows beside the hidden states.
    """
    shape, x = _head_rows(hidden, index, dense_weight, options)
    bias = None if dense_bias is None else dense_bias.to(x.dtype)
    dense = torch.nn.functional.linear(x, dense_weight.to(x.dtype), bias)
    scores = torch.empty(dense.shape[0], dtype=torch.float32)
    weight, last = out_weight.float(), None if out_bias is None else out_bias.float()
    _C.score_head_dot(shape, dense.data_ptr(), weight.data_ptr(), address(last), scores.data_ptr())
    return scores, dense


def score_head_backward(
    grad_scores: Tensor,  # (N,) fp32
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    out_weight: Tensor,
    dense: Tensor,  # (N, D)
    wants: list[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backend contract: the gradients of hidden, dense_weight, dense_bias, out_weight and
    out_bias.

    One that is not wanted is empty.
    """
    d_dense, weight = torch.empty_like(dense), out_weight.float()
    vectors = [grad_scores.new_empty(dense.shape[1]) for _ in range(2)]
    shape, x = _head_rows(hidden, index, dense_weight, options)
    addresses = (tensor.data_ptr() for tensor in (dense, weight, grad_scores, d_dense, *vectors))
    _C.score_head_dot_backward(shape, *addresses)
    grads = [hidden.new_empty(0) for _ in range(5)]
    if wants[0]:
        rows = torch.mm(d_dense, dense_weight.to(x.dtype))
        if options[2] > 0:
            _C.score_head_gather(
                shape, rows.data_ptr(), rows.stride(0), len(rows), 0, rows.data_ptr()
            )
        grads[0] = rows = rows.to(hidden.dtype)
        if index is not None:
            grads[0] = torch.zeros(hidden.shape, dtype=hidden.dtype).index_copy_(
                0, index.long(), rows
            )
    if wants[1]:
        grads[1] = torch.mm(d_dense.t(), x).to(hidden.dtype)
    for place, grad in enumerate((vectors[0], vectors[1][None], grad_scores.sum()[None]), start=2):
        if wants[place]:
            grads[place] = grad.to(hidden.dtype)
    return tuple(grads)  # type: ignore[return-value]


def ndcg_forward(scores: Tensor, labels: Tensor, offsets: Tensor, k: int) -> Tensor:
    """The backend contract: (Q,) in the dtype of scores and labels, fp32 or fp64."""
    result = scores.new_empty(offsets.shape[0] - 1)
    kernel = _C.ndcg_double if scores.dtype == torch.float64 else _C.ndcg_float
    addresses = (scores.data_ptr(), labels.data_ptr(), offsets.data_ptr())
    sizes = (scores.shape[0], result.shape[0])
    if not kernel(*addresses, *sizes, k, torch.get_num_threads(), result.data_ptr()):
        ragged.check_offsets(offsets, scores.shape[0])
    return result


def approx_ranks_forward(scores: Tensor, offsets: Tensor, alpha: float) -> Tensor:
    """The backend contract: ranks (N,) in the dtype of scores, fp32 or fp64."""
    ranks = torch.empty_like(scores)
    kernel = _C.approx_ranks_double if scores.dtype == torch.float64 else _C.approx_ranks_float
    addresses = (scores.data_ptr(), offsets.data_ptr())
    sizes = (scores.shape[0], offsets.shape[0] - 1)
    if not kernel(alpha, *addresses, *sizes, torch.get_num_threads(), ranks.data_ptr()):
        ragged.check_offsets(offsets, scores.shape[0])
    return ranks


def approx_ranks_backward(
    scores: Tensor,
    grad_ranks: Tensor,
    offsets: Tensor,
    alpha: float,
) -> Tensor:
    """The backend contract: the gradient of (N,) scores by that of (N,) ranks, fp32 or fp64."""
    grad = torch.empty_like(scores)
    wide = scores.dtype == torch.float64
    kernel = _C.approx_ranks_backward_double if wide else _C.approx_ranks_backward_float
    addresses = (scores.data_ptr(), grad_ranks.data_ptr(), offsets.data_ptr())
    sizes = (scores.shape[0], offsets.shape[0] - 1)
    if not kernel(alpha, *addresses, *sizes, torch.get_num_threads(), grad.data_ptr()):
        ragged.check_offsets(offsets, scores.shape[0])
    return grad


def _int8_shape(x: Tensor) -> Any:
    threads = torch.get_num_threads()
    return _C.Int8RowsShape(
        rows=x.shape[0], width=x.shape[1], bf16=x.dtype == torch.bfloat16, num_threads=threads
    )


def _int8_product(x: Tensor, row_scale: Tensor, bias: Tensor) -> Any:
    return _C.Int8Product(x.data_ptr(), row_scale.data_ptr(), bias.data_ptr())


def _int8_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Any]:
    """Values and scales to be written, and where."""
    values, scale = (
        torch.empty(x.shape, dtype=torch.uint8),
        torch.empty(x.shape[0], dtype=torch.float32),
    )
    return values, scale, _C.Int8Rows(values.data_ptr(), scale.data_ptr(), levels)


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The backend contract: x (T, K), bf16 or fp32, as uint8 around levels + 1, and a scale (T,)
    fp32 a row.
    """
    values, scale, to = _int8_rows(x, levels)
    _C.quantize_rows(_int8_shape(x), x.data_ptr(), to)
    return values, scale


def scale_rows_(x: Tensor, row_scale: Tensor, bias: Tensor) -> Tensor:
    """The backend contract: x (T, N) becomes x * row_scale (T,) + bias (N,), in place; both
    fp32.
    """
    _C.scale_rows(_int8_shape(x), _int8_product(x, row_scale, bias), x.data_ptr())
    return x


def gelu_rows(x: Tensor, row_scale: Tensor, bias: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The backend contract: GELU(x * row_scale + bias) as quantize_rows gives it."""
    values, scale, to = _int8_rows(x, levels)
    _C.gelu_rows(_int8_shape(x), _int8_product(x, row_scale, bias), to)
    return values, scale


def norm_rows(
    x: Tensor,
    row_scale: Tensor,
    bias: Tensor,
    residual: Tensor,  # (T, N) fp32
    norm_weight: Tensor,  # (N,) fp32
    norm_bias: Tensor,  # (N,) fp32
    eps: float,
    levels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend contract: LayerNorm(residual + x * row_scale + bias) in fp32, and as
    quantize_rows gives it.
    """
    y, (values, scale, to) = torch.empty_like(residual), _int8_rows(x, levels)
    norm = (residual.data_ptr(), norm_weight.data_ptr(), norm_bias.data_ptr(), eps, y.data_ptr())
    _C.norm_rows(_int8_shape(x), _int8_product(x, row_scale, bias), *norm, to)
    return y, values, scale
