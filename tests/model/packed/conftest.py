"""Packed execution as on a GPU, without one."""

import functools

import pytest
import torch

from rerank_fast.model.packed import encoder, layers, pre_norm_step


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> str:
    """Layers take the kernels of a GPU: the device, which without one is that of Triton's
    interpreter.
    """
    pytest.importorskip("triton")
    for module, op in (
        (layers, "varlen_attention"),
        (layers, "residual_norm"),
        (pre_norm_step, "varlen_attention"),
    ):
        monkeypatch.setattr(module, op, functools.partial(getattr(module, op), backend="triton"))
    for choose in ("backend_for", "own_backend_for"):
        monkeypatch.setattr(layers, choose, lambda *tensors: "triton")
    for module in (encoder, pre_norm_step):
        monkeypatch.setattr(module, "has_kernels", lambda *arguments: True)
    return "cuda" if torch.cuda.is_available() else "cpu"
