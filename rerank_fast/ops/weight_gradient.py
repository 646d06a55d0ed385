"""grad.T @ x, the gradient of a product's weight.

Where a processor multiplies bf16 in tiles (AMX), oneDNN's product of a transposed matrix takes two
to three times as long as that of one that lies as it is read: more than a transposed copy costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rerank_fast.ops import cpu
from rerank_fast.ops.cpu import rows as cpu_rows
from rerank_fast.ops.registry import declare


def _fake_transposed(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0])


@declare("transposed", fake=_fake_transposed)
def _transposed(x: Tensor) -> Tensor:
    return cpu_rows.transposed(x.contiguous())


def _in_tiles(grad: Tensor) -> bool:
    return (
        grad.is_cpu
        and grad.dtype == torch.bfloat16
        and not torch.compiler.is_compiling()  # which can't ask for the instruction set
        and cpu.available()
        and cpu.instruction_set() == "amx_bf16"
    )


def weight_gradient(
    grad: Tensor,  # (T, out)
    x: Tensor,  # (T, in)
) -> Tensor:
    """grad.T @ x, (out, in), contiguous and in their dtype."""
    if not _in_tiles(grad):
        return grad.t() @ x
    if grad.shape[1] <= x.shape[1]:  # the smaller one is copied
        return _transposed(grad) @ x
    return _transposed(_transposed(x) @ grad)
