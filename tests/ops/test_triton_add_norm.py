"""The sum and the norm before a sublayer in Triton beside PyTorch in fp64, through the interpreter
or on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from rerank_fast.ops.layer_kernels import kernels_of
from tests.ops.test_backends import require_triton
from tests.ops.test_layer_kernels import KINDS, check_add_norm


# Not bf16, which the interpreter cuts where a GPU rounds: fp16 loses less by that.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_add_norm(kind: str, dtype: torch.dtype) -> None:
    require_triton()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_add_norm(kernels_of("triton"), kind, (19, 6), dtype, device)
