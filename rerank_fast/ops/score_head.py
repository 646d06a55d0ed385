"""The score head, gather -> dense -> activation -> dropout -> dot: schema -> fake -> backends ->
score_head().
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor

from rerank_fast.ops.choices import Activation
from rerank_fast.ops.cpu import rows as cpu_rows
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.layout import rows_contiguous
from rerank_fast.ops.options import check_choice, check_flag, check_seed, check_share
from rerank_fast.ops.reference import score_head as reference
from rerank_fast.ops.registry import Backend, Backends, Served, declare

_ACTIVATIONS = get_args(Activation)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _refusal(hidden: Tensor) -> str:
    """Why the kernels don't take this; empty where they do."""
    return "" if hidden.dtype in _KERNEL_DTYPES else f"takes fp32, bf16 or fp16, got {hidden.dtype}"


def _triton() -> tuple[Callable[..., Any], ...]:
    from rerank_fast.ops.triton import score_head, score_head_backward

    return score_head.forward, score_head_backward.backward


_BACKENDS = Backends(
    "score_head",
    reference=Served(lambda: (reference.forward, reference.backward)),
    cpu=Served(lambda: (cpu_rows.score_head_forward, cpu_rows.score_head_backward), _refusal),
    triton=Served(_triton, _refusal),
)


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
) -> _Gradients:
    shapes = (hidden.shape, dense_weight.shape, dense_weight.shape[:1], out_weight.shape, (1,))
    return tuple(  # type: ignore[return-value]
        hidden.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wants, strict=True)
    )


@declare("score_head", fake=_fake_forward)
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
    forward, _ = _BACKENDS[backend]
    vectors = (dense_weight, dense_bias, out_weight, out_bias)
    weights = (None if tensor is None else tensor.contiguous() for tensor in vectors)
    options = (activation, dropout_p, dropout_in_p, seed)
    with _outside_autocast(hidden.device.type):
        return forward(rows_contiguous(hidden), index, *weights, *options)


@declare("score_head_backward", fake=_fake_backward)
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
) -> _Gradients:
    """wants: of hidden, dense_weight, dense_bias, out_weight, out_bias; the gradient of what is not
    wanted is empty.
    """
    _, backward = _BACKENDS[backend]
    bias = None if dense_bias is None else dense_bias.contiguous()
    weights = (dense_weight.contiguous(), bias, out_weight.contiguous())
    options = (activation, dropout_p, dropout_in_p, seed)
    with _outside_autocast(hidden.device.type):
        return backward(
            grad_scores.contiguous(),
            rows_contiguous(hidden),
            index,
            *weights,
            dense,
            wants,
            *options,
        )


def _outside_autocast(device_type: str) -> AbstractContextManager[Any]:
    """What is narrow was made so by the caller: an autocast region changes nothing here."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


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
        scores, dense = _forward(
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
        grads = _backward(grad_scores, *ctx.saved_tensors, wants, *ctx.options)
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
    options = (activation, *shares, check_seed(seed), _BACKENDS.resolve(backend, hidden))
    return _ScoreHead.apply(
        hidden, first_token_index, dense_weight, dense_bias, out_weight, out_bias, options
    )
