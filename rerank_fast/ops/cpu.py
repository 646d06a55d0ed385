"""The CPU backend: hands tensors' addresses to the compiled kernels in csrc/."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

try:
    import rerank_fast._C as _compiled
except ImportError as error:
    _C: Any = None
    _reason = str(error)
else:
    _C, _reason = _compiled, ""

# The enums of csrc/lambda_loss.h.
_SCHEMES = {"none": 0, "ndcg1": 1, "ndcg2": 2, "lambdarank": 3, "ndcg2pp": 4}
_REDUCTIONS = {"pairs": 0, "lists": 1, "sum": 2, "none": 3}
_SCALES = {"binary": 1 / math.log(2), "natural": 1.0}


def available() -> bool:
    """Whether the compiled module is there."""
    return _C is not None


def unavailable_reason() -> str:
    """What is missing and how to get it."""
    return (
        f"the compiled module rerank_fast._C is missing ({_reason}). Install a C++17 compiler "
        "(Debian and Ubuntu: apt-get install g++) and run: pip install --force-reinstall --no-deps -e ."
    )


def forward(
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
) -> tuple[Tensor, Tensor]:
    """The backend contract: the loss, () or (Q,), and dL/dscores (N,), in fp32 or, for fp64 scores, fp64."""
    if scores.dtype == torch.float64:
        kernel = _C.lambda_loss_double
    else:
        scores, kernel = scores.float(), _C.lambda_loss_float
    num_lists = offsets.shape[0] - 1
    loss = scores.new_empty((num_lists,) if reduction == "none" else ())
    grad = torch.empty_like(scores)
    kernel(
        scores.data_ptr(),
        labels.data_ptr(),
        offsets.data_ptr(),
        num_lists,
        _SCHEMES[scheme],
        k,
        sigma,
        mu,
        eps,
        _SCALES[reduction_log],
        _REDUCTIONS[reduction],
        torch.get_num_threads(),
        loss.data_ptr(),
        grad.data_ptr(),
    )
    return loss, grad
