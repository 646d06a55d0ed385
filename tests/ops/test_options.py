"""An option that is none is a ValueError that names it and what came, the same on every backend."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rerank_fast.losses import LambdaLoss, NDCGLoss2PPScheme
from rerank_fast.ops.approx_ranks import approx_ranks
from rerank_fast.ops.int8_linear import int8_gelu, int8_linear, int8_norm, quantize_weight
from rerank_fast.ops.lambda_loss import count_pairs, lambda_loss
from rerank_fast.ops.ndcg import ndcg
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.score_head import score_head
from rerank_fast.ops.varlen_attention import varlen_attention
from tests.ops.test_backends import require_triton

nan, inf = math.nan, math.inf

SCORES, LABELS, OFFSETS = torch.linspace(-1, 1, 6), torch.arange(6) % 2.0, torch.tensor([0, 4, 6])
ROWS, VECTOR = torch.linspace(-1, 1, 32).view(4, 8), torch.linspace(0.5, 1, 8)
HEADS, ENDS = torch.linspace(-1, 1, 128).view(4, 2, 16), torch.tensor([0, 3, 4], dtype=torch.int32)
WEIGHT = quantize_weight(ROWS, None)


def _norm(backend: Any, eps: Any = 1e-5, **options: Any) -> Any:
    return residual_norm(ROWS, ROWS, VECTOR, VECTOR, eps=eps, backend=backend, **options)[0]


def _int8_norm(backend: Any, eps: Any = 1e-5) -> Any:
    return int8_norm(
        ROWS, quantize_weight(torch.eye(8), None), ROWS, VECTOR, VECTOR, eps=eps, backend=backend
    )[0]


CALLS: dict[str, Any] = {
    "approx_ranks": lambda b, **o: approx_ranks(SCORES, OFFSETS, backend=b, **o),
    "lambda_loss": lambda b, **o: lambda_loss(SCORES, LABELS, OFFSETS, backend=b, **o),
    "count_pairs": lambda b, **o: count_pairs(SCORES, LABELS, OFFSETS, **o),
    "ndcg": lambda b, **o: ndcg(SCORES, LABELS, OFFSETS, backend=b, **o),
    "varlen_attention": lambda b, **o: varlen_attention(
        HEADS, HEADS, HEADS, ENDS, ENDS, backend=b, **o
    ),
    "residual_norm": _norm,
    "score_head": lambda b, **o: score_head(
        ROWS, None, torch.eye(8), VECTOR, VECTOR[None], VECTOR[:1], backend=b, **o
    ),
    "int8_linear": lambda b, **o: int8_linear(ROWS, WEIGHT, backend=b, **o),
    "int8_gelu": lambda b, **o: int8_gelu(ROWS, WEIGHT, backend=b, **o).dequantize(),
    "int8_norm": _int8_norm,
}
BACKENDS = {
    "count_pairs": [None],
    **{op: ["reference", "cpu"] for op in ("int8_linear", "int8_gelu", "int8_norm")},
}

WORDS = [None, 2, "", "cosine", ["none"], torch.tensor(1)]
CUTS = [-1, 2**63, 2**70, "3", 2.5, 2.0, True, nan, [3], torch.tensor(3)]
SEEDS = [-1, -(2**70), 2**63, 2**70, "3", 1.0, None, True]
SHARES = [-0.1, 1.0, 1, 2**70, nan, inf, "0.1", None, True, torch.tensor(0.1)]
ABOVE_ZERO = [
    0,
    0.0,
    -1,
    -1e-30,
    1e-320,
    1e300,
    2**2000,
    nan,
    inf,
    -inf,
    "1",
    None,
    True,
    torch.tensor(1.0),
]
AT_LEAST_ZERO = [-1, -1e-30, 1e300, nan, inf, "10", None, True]
FLAGS = [None, 1, 0, "yes", torch.tensor(True)]
WRONG = {
    "approx_ranks": {"alpha": ABOVE_ZERO},
    "lambda_loss": {
        "scheme": WORDS,
        "k": CUTS,
        "sigma": ABOVE_ZERO,
        "mu": AT_LEAST_ZERO,
        "eps": ABOVE_ZERO,
        "reduction_log": WORDS,
        "reduction": WORDS[1:],
    },
    "count_pairs": {"scheme": WORDS, "k": CUTS},
    "ndcg": {"k": CUTS},
    "varlen_attention": {
        "scale": [nan, inf, -inf, 1e300, 2**2000, "0.1", True],
        "causal": FLAGS,
        "window": [
            (-2, 0),
            (0, 2.0),
            (1.5, 2),
            (2**31, 0),
            (0, 2**70),
            (1,),
            (1, 2, 3),
            "12",
            3,
            (True, 1),
            (nan, 1),
        ],
        "softcap": [one for one in ABOVE_ZERO if one is not None],
        "max_seqlens": [(-1, 3), (2.0, 3), (3,), 3, "33", (2**31, 3), (True, 3)],
        "dropout_p": SHARES,
        "seed": SEEDS,
    },
    "residual_norm": {"eps": ABOVE_ZERO, "dropout_p": SHARES, "seed": SEEDS},
    "score_head": {
        "activation": WORDS,
        "dropout_p": SHARES,
        "dropout_in_p": SHARES,
        "training": FLAGS,
        "seed": SEEDS,
    },
    "int8_norm": {"eps": ABOVE_ZERO},
}


@pytest.mark.parametrize(
    ("op", "option", "backend"),
    [
        (op, option, backend)
        for op, options in WRONG.items()
        for option in options
        for backend in BACKENDS.get(op, ["reference", "cpu", "triton"])
    ],
)
def test_what_is_none_is_refused(op, option, backend):
    if backend == "triton":
        require_triton()
    for value in WRONG[op][option]:
        with pytest.raises(ValueError, match=rf"^{option} must be ") as error:
            CALLS[op](backend, **{option: value})
        assert str(error.value).endswith(f"got {value!r}"), error.value


@pytest.mark.parametrize("op", CALLS)
def test_a_backend_that_is_none_is_refused(op):
    for backend in ("cuda", 3, ["cpu"], torch.tensor(1)):
        if op != "count_pairs":
            with pytest.raises(ValueError, match=re.escape(f"or None, got {backend!r}")):
                CALLS[op](backend)


def test_what_a_number_may_come_as():
    """NumPy's numbers are numbers, and the ends of a range belong to it."""
    same = [
        (
            "lambda_loss",
            {"k": np.int32(2), "sigma": np.float32(0.5), "mu": np.float64(2), "eps": 1},
        ),
        ("lambda_loss", {"k": 2, "sigma": 0.5, "mu": 2.0, "eps": 1.0}),
    ]
    (op, one), (_, other) = same
    assert torch.equal(CALLS[op](None, **one), CALLS[op](None, **other))
    assert torch.equal(CALLS["ndcg"](None, k=2**63 - 1), CALLS["ndcg"](None, k=None))
    assert torch.equal(CALLS["ndcg"](None, k=np.uint8(0)), CALLS["ndcg"](None))
    largest = CALLS["varlen_attention"](None, window=[2**31 - 1, np.int64(-1)], seed=2**63 - 1)
    assert torch.equal(largest, CALLS["varlen_attention"](None))
    for backend in ("reference", "cpu", "triton"):
        if backend == "triton":
            require_triton()
        options = {"dropout_p": 0.4, "seed": 2**63 - 1}
        torch.testing.assert_close(_norm(backend, **options), _norm("reference", **options))
        flat = CALLS["varlen_attention"](backend, scale=0)  # every key weighs the same
        torch.testing.assert_close(flat[:3], HEADS[:3].mean(0).expand(3, 2, 16))


def test_sizes_of_nothing_are_refused():
    nothing = torch.zeros(4, 2, 0)
    with pytest.raises(
        ValueError, match=r"at least 1 head and a head_size of at least 1, got \(4, 2, 0\)"
    ):
        varlen_attention(nothing, nothing, nothing, ENDS, ENDS)
    with pytest.raises(ValueError, match="at least 1 head"):
        varlen_attention(HEADS[:, :0], HEADS, HEADS, ENDS, ENDS)
    with pytest.raises(
        ValueError, match="cu_seqlens_q must rise from 0 to 4 tokens, got a single one"
    ):
        varlen_attention(HEADS, HEADS, HEADS, ENDS[:1], ENDS[:1])
    with pytest.raises(ValueError, match=r"\(T, H\) with H of at least 1, got \(4, 0\)"):
        residual_norm(ROWS[:, :0], ROWS[:, :0], VECTOR[:0], VECTOR[:0], eps=1e-5)
    for weight in (VECTOR, ROWS[:0], ROWS[:, :0], ROWS.long()):
        with pytest.raises(ValueError, match="weight must be a floating-point tensor of shape"):
            quantize_weight(weight, None)
    with pytest.raises(ValueError, match=r"bias must have the shape \(4,\), got \(8,\)"):
        quantize_weight(ROWS, VECTOR)


class _Model(nn.Module):
    num_labels = 1


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("k", CUTS),
        ("sigma", ABOVE_ZERO),
        ("eps", ABOVE_ZERO),
        ("reduction_log", WORDS),
        ("packed", FLAGS),
        ("mini_batch_size", [2.5, 2.0, "3", nan, True, [3]]),
        ("weighting_scheme", ["ndcg2pp", 3]),
        ("activation_fn", ["Sigmoid", 3]),
    ],
)
def test_the_drop_in_loss_refuses_them_when_it_is_made(option, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{option} must be ") as error:
            LambdaLoss(_Model(), **{option: value})
        assert str(error.value).endswith(f"got {value!r}")


def test_the_drop_in_loss_takes_what_sentence_transformers_takes():
    loss = LambdaLoss(
        _Model(), None, k=0, sigma=2, eps=1e-6, activation_fn=None, mini_batch_size=-1
    )
    assert loss.get_config_dict()["sigma"] == 2
    for mu in AT_LEAST_ZERO:
        with pytest.raises(
            ValueError, match=r"^mu must be a finite fp32 number of at least 0, got"
        ):
            NDCGLoss2PPScheme(mu)
