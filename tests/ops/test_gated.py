"""The gated activation's kernels beside PyTorch's in fp64, through Triton's interpreter or on a
GPU.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from rerank_fast.model.packed.pre_norm_parts import gate_of
from tests.ops.test_backends import require_triton

_EXACT = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", _EXACT)
def test_the_kernels_give_what_pytorch_gives(activation: str, dtype: torch.dtype) -> None:
    require_triton()
    from rerank_fast.ops.triton.gated import gated, gated_grad

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate_up = torch.randn(3, 2 * 70).mul(3)
    gate_up[0, :6] = torch.tensor([0.0, -0.0, 40.0, -40.0, 1e4, -1e4])
    gate_up, grad = gate_up.to(device, dtype), torch.randn(3, 70).to(device, dtype)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, dim=1)
    expected = _EXACT[activation](gate) * up
    expected.backward(grad.double())
    # Triton's interpreter cuts to 16 bits where a GPU rounds. In fp32 some roundings of terms.
    relative = 2**-7 if dtype == torch.bfloat16 else 1e-5
    bound = {"rtol": relative, "atol": 2e-6}
    torch.testing.assert_close(gated(gate_up, activation).double(), expected, **bound)
    found = gated_grad(gate_up, grad, activation)
    torch.testing.assert_close(found.double(), exact.grad, **bound)


def test_a_gate_is_known_by_its_kind() -> None:
    known = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "relu": None}
    assert {name: gate_of(ACT2FN[name]) for name in known} == known
    assert gate_of(nn.GELU("tanh")) == "gelu_tanh"
    hooked = nn.GELU("tanh")
    hooked.register_forward_hook(lambda *given: None)
    assert gate_of(hooked) is None
