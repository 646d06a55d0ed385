"""Packed execution as on a GPU, without one."""

import functools
from collections.abc import Iterator

import pytest
import torch

from rerank_fast.model import cross_encoder, pretrained
from rerank_fast.model.packed import (
    bucket_encoder,
    buckets,
    encoder,
    graphs,
    norm,
    post_norm_step,
    pre_norm_step,
)
from rerank_fast.ops import layer_kernels
from tests.model.packed.graph_stand_in import CallStandIn, StandIn


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> str:
    """Layers take the kernels of a GPU: the device, which without one is that of Triton's
    interpreter.
    """
    pytest.importorskip("triton")
    for module, op in (
        (post_norm_step, "varlen_attention"),
        (norm, "residual_norm"),
        (pre_norm_step, "varlen_attention"),
    ):
        monkeypatch.setattr(module, op, functools.partial(getattr(module, op), backend="triton"))
    for choose in ("backend_for", "own_backend_for"):
        monkeypatch.setattr(post_norm_step, choose, lambda *tensors: "triton")
    for module in (encoder, bucket_encoder, layer_kernels):
        monkeypatch.setattr(module, "triton_serves", lambda *arguments: True)
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StandIn]]:
    """Graphs are stood in for; gives those that were captured."""
    monkeypatch.setattr(graphs, "CudaGraphs", StandIn)
    monkeypatch.setattr(buckets, "_LEAST", (16, 4))  # less for Triton's interpreter
    StandIn.made.clear()
    yield StandIn.made
    StandIn.made.clear()


@pytest.fixture
def scoring_replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CallStandIn]]:
    """Graphs that score are stood in for, on whatever device; gives those that were captured."""
    monkeypatch.setattr(graphs, "CudaGraph", CallStandIn)
    monkeypatch.setattr(graphs, "warm_up", lambda call, device: call())
    monkeypatch.setattr(buckets, "_LEAST", (16, 4))
    for module in (cross_encoder, pretrained):
        monkeypatch.setattr(module, "has_graphs", lambda device: True)
    CallStandIn.made.clear()
    yield CallStandIn.made
    CallStandIn.made.clear()
