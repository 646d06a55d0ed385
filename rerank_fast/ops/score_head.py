"""The score head, gather -> dense -> activation -> dropout -> dot: schema -> fake -> backends ->
score_head().
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rerank_fast.ops import backends, cpu
from rerank_fast.ops.attention_reference import dropout_factors
from rerank_fast.ops.backends import Backend
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.options import check_choice, check_flag, check_seed, check_share

Activation = Literal["tanh", "gelu", "relu", "none"]
_ACTIVATIONS = get_args(Activation)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("rerank_fast", "FRAGMENT")
_OPTIONS = "str activation, float dropout_p, float dropout_in_p, int seed, str backend"
_LIBRARY.define(
    "score_head(Tensor hidden, Tensor? index, Tensor dense_weight, Tensor? dense_bias, Tensor "
    f"out_weight, Tensor? out_bias, {_OPTIONS}) -> (Tensor scores, Tensor dense)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# wants: of hidden, dense_weight, dense_bias, out_weight, out_bias; the gradient of what is not
# wanted is empty.
_LIBRARY.define(
    "score_head_backward(Tensor grad_scores, Tensor hidden, Tensor? index, Tensor dense_weight, "
    f"Tensor? dense_bias, Tensor out_weight, Tensor dense, bool[] wants, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.register_fake("rerank_fast::score_head", lib=_LIBRARY)
def _fake_forward(
    hidden: Tensor, index: Tensor | None, dense_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    rows, wide = (
        hidden if index is None else index,
        torch.promote_types(hidden.dtype, torch.float32),
    )
    scores = hidden.new_empty(rows.shape[0], dtype=wide)
    if rest[-1] != "cpu":
        return scores, hidden.new_empty(0)
    stored = wide if hidden.dtype == torch.float16 else hidden.dtype
    return scores, hidden.new_empty((rows.shape[0], dense_weight.shape[0]), dtype=stored)


@torch.library.register_fake("rerank_fast::score_head_backward", lib=_LIBRARY)
def _fake_backward(
    grad_scores: Tensor,
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    out_weight: Tensor,
    dense: Tensor,
    wants: list[bool],
    *options: Any,
) -> Gradients:
    shapes = (hidden.shape, dense_weight.shape, dense_weight.shape[:1], out_weight.shape, (1,))
    return tuple(  # type: ignore[return-value]
        hidden.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wants, strict=True)
    )


def _active(dense: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation and its slope."""
    if activation == "tanh":
        active = dense.tanh()
        return active, 1 - active * active
    if activation == "gelu":
        below = (1 + torch.erf(dense / math.sqrt(2))) / 2
        return dense * below, below + dense * torch.exp(-dense * dense / 2) / math.sqrt(2 * math.pi)
    if activation == "relu":
        return dense.relu(), (~(dense <= 0)).to(dense.dtype)  # of NaN 1, as torch has it
    return dense, torch.ones_like(dense)


def _dropped(x: Tensor, p: float, seed: int, stream: int) -> Tensor | float:
    """The factors of a dropout of the (N, columns) of x."""
    if p == 0:
        return 1.0
    return dropout_factors(
        seed, stream, torch.arange(x.shape[0], device=x.device), x.shape[1], p
    ).to(x.dtype)


def _reference_dense(
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    dropout_in_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor | float]:
    """The rows that are read, dropped out, the dense layer's result, and the factors."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    x = (hidden if index is None else hidden[index]).to(wide)
    factors = _dropped(x, dropout_in_p, seed, 1)
    x = x * factors
    return (
        x,
        F.linear(x, dense_weight.to(wide), None if dense_bias is None else dense_bias.to(wide)),
        factors,
    )


def _reference_forward(
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_in_p: float,
    seed: int,
) -> Tensor:
    """The specification, any dtype."""
    _, dense, _ = _reference_dense(hidden, index, dense_weight, dense_bias, dropout_in_p, seed)
    active, _ = _active(dense, activation)
    active = active * _dropped(active, dropout_p, seed, 0)
    scores = F.linear(
        active, out_weight.to(dense.dtype), None if out_bias is None else out_bias.to(dense.dtype)
    )
    return scores.squeeze(1)


def _reference_backward(
    grad_scores: Tensor,
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    out_weight: Tensor,
    wants: list[bool],
    activation: str,
    dropout_p: float,
    dropout_in_p: float,
    seed: int,
) -> Gradients:
    x, dense, factors = _reference_dense(
        hidden, index, dense_weight, dense_bias, dropout_in_p, seed
    )
    active, slope = _active(dense, activation)
    kept = grad_scores[:, None] * _dropped(active, dropout_p, seed, 0)
    d_dense = kept * out_weight.to(dense.dtype) * slope
    grads = [hidden.new_empty(0) for _ in wants]
    if wants[0]:
        d_rows = d_dense @ dense_weight.to(dense.dtype) * factors
        grads[0] = (
            d_rows
            if index is None
            else d_rows.new_zeros(hidden.shape).index_copy(0, index.long(), d_rows)
        )
    if wants[1]:
        grads[1] = d_dense.t() @ x
    if wants[2]:
        grads[2] = d_dense.sum(dim=0)
    if wants[3]:
        grads[3] = (kept * active).sum(dim=0, keepdim=True)
    if wants[4]:
        grads[4] = grad_scores.sum(dim=0, keepdim=True)
    return tuple(grad.to(hidden.dtype) for grad in grads)  # type: ignore[return-value]


def _forward(
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    activation: str,
    dropout_p: float,
    dropout_in_p: float,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if index is not None:
        _check_rows(index, hidden.shape[0])
    # Triton is imported when it is first asked for.
    forward: Any = _reference_forward
    if backend == "cpu":
        forward = cpu.score_head_forward
    elif backend == "triton":
        from rerank_fast.ops.triton import score_head as triton_forward

        forward = triton_forward.forward
    vectors = (dense_weight, dense_bias, out_weight, out_bias)
    weights = (None if tensor is None else tensor.contiguous() for tensor in vectors)
    options = (activation, dropout_p, dropout_in_p, seed)
    with _outside_autocast(hidden.device.type):
        result = forward(_rows_contiguous(hidden), index, *weights, *options)
    return result if isinstance(result, tuple) else (result, hidden.new_empty(0))


def _backward(
    grad_scores: Tensor,
    hidden: Tensor,
    index: Tensor | None,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    out_weight: Tensor,
    dense: Tensor,
    wants: list[bool],
    activation: str,
    dropout_p: float,
    dropout_in_p: float,
    seed: int,
    backend: str,
) -> Gradients:
    backward: Any = _reference_backward
    if backend == "cpu":
        backward = cpu.score_head_backward
    elif backend == "triton":
        from rerank_fast.ops.triton import score_head_backward as triton_backward

        backward = triton_backward.backward
    bias = None if dense_bias is None else dense_bias.contiguous()
    weights = (dense_weight.contiguous(), bias, out_weight.contiguous())
    options = (activation, dropout_p, dropout_in_p, seed)
    saved = (dense,) if backend == "cpu" else ()
    with _outside_autocast(hidden.device.type):
        return backward(
            grad_scores.contiguous(),
            _rows_contiguous(hidden),
            index,
            *weights,
            *saved,
            wants,
            *options,
        )


_LIBRARY.impl("score_head", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("score_head_backward", _backward, "CompositeExplicitAutograd")


def _outside_autocast(device_type: str) -> AbstractContextManager[Any]:
    """What is narrow was made so by the caller: an autocast region changes nothing here."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


def _rows_contiguous(hidden: Tensor) -> Tensor:
    """Rows may lie anywhere, as the first tokens of a padded batch do, but each must be one run of
    memory.
    """
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()


class _ScoreHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        index: Tensor | None,
        dense_weight: Tensor,
        dense_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        options: tuple[Any, ...],
    ) -> Tensor:
        scores, dense = torch.ops.rerank_fast.score_head.default(
            hidden, index, dense_weight, dense_bias, out_weight, out_bias, *options
        )
        # Inputs are alive anyway. On a CPU the dense layer's result is kept, elsewhere backward
        # computes it again.
        ctx.save_for_backward(hidden, index, dense_weight, dense_bias, out_weight, dense)
        ctx.options = options
        return scores

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        hidden, _, *weights, _ = ctx.needs_input_grad
        wants = [hidden, *weights]
        grads = torch.ops.rerank_fast.score_head_backward.default(
            grad_scores, *ctx.saved_tensors, wants, *ctx.options
        )
        d_hidden, *rest = (grad if want else None for grad, want in zip(grads, wants, strict=True))
        return d_hidden, None, *rest, None


def _check(hidden: Tensor, index: Tensor | None, **weights: Tensor | None) -> None:
    if hidden.dim() != 2 or not hidden.dtype.is_floating_point:
        raise ValueError(
            f"hidden must be a floating-point tensor of shape (T, H), got {hidden.dtype} "
            f"{tuple(hidden.shape)}"
        )
    dense = weights["dense_weight"]
    size = dense.shape[0] if dense is not None and dense.dim() == 2 else "D"
    shapes = {
        "dense_weight": (size, hidden.shape[1]),
        "dense_bias": (size,),
        "out_weight": (1, size),
        "out_bias": (1,),
    }
    for name, tensor in weights.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{name} must have the shape {shapes[name]}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != hidden.dtype or tensor.device != hidden.device:
            raise ValueError(
                f"{name} must have hidden's dtype and device, {hidden.dtype} on {hidden.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if index is None:
        return
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"first_token_index must be int32 or int64 of shape (N,), got {index.dtype} "
            f"{tuple(index.shape)}"
        )
    if index.device != hidden.device:
        raise ValueError(
            f"first_token_index must be on hidden's device {hidden.device}, got {index.device}"
        )


def _check_rows(index: Tensor, num_hidden: int) -> None:
    """Raises ValueError unless an index on the CPU holds different rows; a GPU's is not waited for.

    The op's implementation asks it, and not the public function, whose checks torch.compile traces
    away.
    """
    if not index.is_cpu or index.numel() == 0:
        return
    rising = index if bool((index[1:] > index[:-1]).all()) else index.sort().values
    if (
        int(rising[0]) < 0
        or int(rising[-1]) >= num_hidden
        or not bool((rising[1:] > rising[:-1]).all())
    ):
        raise ValueError(
            f"first_token_index must hold different rows from 0 to {num_hidden - 1}, got "
            f"{index.tolist()[:8]} ..."
        )


def _unserved(backend: str, hidden: Tensor) -> str:
    """Why the kernels don't take this; empty where they do."""
    return "" if hidden.dtype in _KERNEL_DTYPES else f"takes fp32, bf16 or fp16, got {hidden.dtype}"


def score_head(
    hidden: Tensor,  # (T, H)
    first_token_index: Tensor | None,  # (N,)
    dense_weight: Tensor,  # (D, H)
    dense_bias: Tensor | None,  # (D,)
    out_weight: Tensor,  # (1, D)
    out_bias: Tensor | None,  # (1,)
    *,
    activation: Activation = "tanh",
    dropout_p: float = 0.0,
    dropout_in_p: float = 0.0,
    training: bool = False,
    seed: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """out(dropout(activation(dense(dropout_in(hidden[first_token_index]))))): the head of BERT and
    its kin.

    BERT: the pooler is the dense layer, tanh, then dropout and the classifier. RoBERTa, XLM-R,
    CamemBERT and
    ELECTRA drop out the first token too. DistilBERT: relu.

    Args:
        hidden: (T, H) hidden states of all tokens, of which only the indexed rows are read; fp32,
            bf16 or fp16 (any floating dtype on the reference). Rows may lie apart, so `states[:,
            0]` of a padded batch is not copied.
        first_token_index: (N,) int32 or int64, the row of each pair's first token, no row twice;
            `cu_seqlens[:-1]` of a packed batch. None takes every row, and the gradient of hidden is
            then not scattered. A GPU's values are not waited for: the score of an index that names
            no row is NaN, and so are the weights' gradients.
        dense_weight: (D, H), in hidden's dtype like the other weights.
        dense_bias: (D,) or None.
        out_weight: (1, D).
        out_bias: (1,) or None.
        activation: "tanh", "gelu" (exact), "relu" or "none".
        dropout_p: share of the activations that is dropped in training.
        dropout_in_p: share of the gathered rows that is dropped in training.
        training: drop at all.
        seed: chooses what is dropped; the same seed drops the same elements, on every backend and
            in backward.
        backend: "cpu" (C++ around the machine's matrix product), "triton" or "reference"; None
            takes the device's own.

    Returns:
        (N,) scores in fp32 (fp64 for fp64), accumulated in it. Only gradients that are asked for
        are computed, each in its tensor's dtype; differentiating twice raises RuntimeError. NaN and
        infinities in a row give what the formula gives, in its own score alone.

    Raises:
        ValueError: a wrong shape, dtype, device or option, a backend that can't run here, or an
            index on the CPU that names no row, or one twice.
    """
    _check(
        hidden,
        first_token_index,
        dense_weight=dense_weight,
        dense_bias=dense_bias,
        out_weight=out_weight,
        out_bias=out_bias,
    )
    check_choice("activation", activation, _ACTIVATIONS)
    check_flag("training", training)
    after, before = check_share("dropout_p", dropout_p), check_share("dropout_in_p", dropout_in_p)
    shares = (after, before) if training else (0.0, 0.0)
    resolved = backends.resolve(
        "score_head", backend, hidden, unserved=partial(_unserved, hidden=hidden)
    )
    options = (activation, *shares, check_seed(seed), resolved)
    return _ScoreHead.apply(
        hidden, first_token_index, dense_weight, dense_bias, out_weight, out_bias, options
    )
