"""The dtypes that ops are timed in: fp32, and bf16, which is slow where a CPU only emulates it."""

from __future__ import annotations

import pytest
import torch

from rerank_fast.model.precision.hardware import is_fast

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_MARKS = () if is_fast(torch.bfloat16, _DEVICE) else (pytest.mark.slow,)
DTYPES = (pytest.param(torch.bfloat16, marks=_MARKS), torch.float32)
