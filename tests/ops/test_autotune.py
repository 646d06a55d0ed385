"""RERANK_FAST_AUTOTUNE=1: every candidate runs, and what it computes is the reference's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rerank_fast.ops.approx_ranks import approx_ranks
from rerank_fast.ops.lambda_loss import lambda_loss
from rerank_fast.ops.ndcg import ndcg
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.score_head import score_head
from rerank_fast.ops.varlen_attention import varlen_attention
from tests.ops.test_backends import require_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def autotune(monkeypatch):
    require_triton()
    from rerank_fast.ops.triton import autotune

    monkeypatch.setattr(autotune, "ENABLED", True)
    autotune._tuner.cache_clear()
    return autotune


def _attention(backend, q, ends):
    return varlen_attention(
        q,
        q * 2,
        q - 1,
        ends,
        ends,
        causal=True,
        dropout_p=0.2,
        seed=3,
        softcap=2.0,
        backend=backend,
    )


def _score_head(backend, x, ends):
    vector = torch.linspace(-1, 1, x.shape[1], device=x.device)
    weight = vector[:, None] * vector.flip(0)
    return score_head(
        x,
        ends[2:4].long(),
        weight,
        vector,
        vector[None],
        vector[:1],
        activation="tanh",
        backend=backend,
    )


def _residual_norm(backend, x, ends):
    ones = torch.ones(x.shape[1], device=x.device)
    return residual_norm(x, x * x, ones, ones, eps=1e-5, dropout_p=0.3, seed=2, backend=backend)[0]


def _lambda_loss(backend, scores, ends):
    labels = torch.arange(len(scores), device=scores.device) % 3.0
    return lambda_loss(scores, labels, ends.long(), backend=backend)


def _approx_ranks(backend, scores, ends):
    return approx_ranks(scores, ends.long(), backend=backend).square()


def _ndcg(backend, scores, ends):
    return ndcg(
        scores, torch.arange(len(scores), device=scores.device) % 3.0, ends.long(), backend=backend
    )


@pytest.mark.parametrize(
    ("call", "shape", "kernels"),
    [
        (_attention, (23, 2, 16), 3),
        (_score_head, (23, 24), 3),
        (_residual_norm, (23, 24), 2),
        (_lambda_loss, (23,), 1),
        (_ndcg, (23,), 1),
        (_approx_ranks, (23,), 1),
    ],
)
def test_results_and_gradients(autotune, call, shape, kernels):
    torch.manual_seed(0)
    leaf = torch.randn(shape, device=DEVICE).requires_grad_()
    ends = torch.tensor([0, 5, 5, 18, 23], dtype=torch.int32, device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        out = call(backend, leaf, ends)
        results.append(
            (out, *torch.autograd.grad(out.sum(), leaf)) if out.requires_grad else (out,)
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert autotune._tuner.cache_info().currsize == kernels


def test_off_is_the_kernel_and_its_shipped_config():
    require_triton()
    from rerank_fast.ops.triton import autotune

    kernel, config = object(), {"BLOCK": 32, "num_warps": 4}
    if not autotune.ENABLED:
        assert autotune.choose(kernel, config, ({"num_warps": 8},), ()) == (kernel, config)


def test_the_shipped_config_is_the_first_candidate(autotune):
    import triton

    from rerank_fast.ops.triton.ndcg import ndcg_kernel

    shipped = {"BLOCK": 32, "num_warps": 4, "enable_fp_fusion": True}
    tuner, rest = autotune.choose(
        ndcg_kernel, shipped, ({"num_warps": 8}, {"BLOCK": 64}), ("dtype",)
    )
    assert tuner.configs[0].all_kwargs() == triton.Config({"BLOCK": 32}, 4).all_kwargs()
    assert [(config.kwargs["BLOCK"], config.num_warps) for config in tuner.configs] == [
        (32, 4),
        (32, 8),
        (64, 4),
    ]
    assert rest == {"enable_fp_fusion": True}
    assert (
        autotune.choose(ndcg_kernel, shipped, ({"num_warps": 8}, {"BLOCK": 64}), ("dtype",))[0]
        is tuner
    )


def test_the_variable_turns_it_on():
    require_triton()
    command = [
        sys.executable,
        "-c",
        "from rerank_fast.ops.triton import autotune; print(autotune.ENABLED)",
    ]
    environment = os.environ | {"RERANK_FAST_AUTOTUNE": "1"}
    assert subprocess.check_output(command, text=True, env=environment).strip() == "True"
