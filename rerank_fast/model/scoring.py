"""Prepared pairs to scores, micro-batch by micro-batch, in the memory that there is. The graph is
kept.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rerank_fast.model.devices import empty_cache
from rerank_fast.model.preparation import Prepared
from rerank_fast.model.tokens.packing import (
    MAX_TOKENS,
    most_tokens,
    plan_micro_batches,
    upload,
)

logger = logging.getLogger(__name__)


def score(
    prepared: Prepared,
    *,
    max_pairs: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """(N,) fp32 scores of all prepared pairs, in their order, on the model's device.

    Args:
        prepared: by CrossEncoder.prepare.
        max_pairs: most pairs in a micro-batch; None sets no limit.
        max_tokens: most tokens in a micro-batch, with the padding where there is any; None and no
            max_pairs takes what keeps the device busy and fits its memory.
        progress: told the number of pairs of every micro-batch that is done.

    Raises:
        MemoryError: a micro-batch does not fit memory, nor does either half of it.
    """
    if max_pairs is None and max_tokens is None:
        max_tokens = _default_max_tokens(prepared)
    if prepared.tokens.input_ids.size > MAX_TOKENS:
        _keep_freed_memory()
    plan = plan_micro_batches(
        prepared.tokens.lengths, max_pairs=max_pairs, max_tokens=max_tokens, padded=prepared.padded
    )
    if not plan:
        return torch.zeros(0)
    parts = []
    with prepared.region:
        for indices in plan:
            parts.append(_score_or_halve(prepared, indices))
            if progress is not None:
                progress(len(indices))
    return in_order(parts, plan)


class _Permuted(torch.autograd.Function):
    """index_select of each row once: its gradient is one too, and needs no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.back), None, None


def in_order(parts: list[Tensor], plan: Sequence[np.ndarray]) -> Tensor:
    """(N,) scores of all micro-batches in the order of the pairs."""
    planned = np.concatenate(plan)
    back, order = upload(np.stack([planned, np.argsort(planned)]), parts[0].device)
    return _Permuted.apply(parts[0] if len(parts) == 1 else torch.cat(parts), order, back)


# About what a token takes in a forward pass that keeps no graph, in bytes a unit of the model's
# width: the residual stream in fp32, and the widest products of a layer beside what they read.
_BYTES_PER_UNIT = 64


def _default_max_tokens(prepared: Prepared) -> int:
    """Tokens of a micro-batch where nobody says how many; half of a GPU's free memory must hold
    them.
    """
    device = prepared.device
    most = most_tokens(device)
    if device.type != "cuda" or prepared.tokens.input_ids.size <= MAX_TOKENS:
        return most
    # What torch keeps for itself is free for torch.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + kept
    return max(min(most, free // 2 // (_BYTES_PER_UNIT * prepared.width)), 1)


@functools.cache
def _keep_freed_memory() -> None:
    """Once a process: the C library then keeps what a layer frees for the next one.

    glibc returns freed memory to the system beyond twice the largest block that was ever mapped and
    freed, and gets it back page by page, cleared: a twentieth of a forward pass in bf16. 32 MiB is
    the largest that counts; it is never written.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _score_or_halve(prepared: Prepared, indices: np.ndarray) -> Tensor:
    """A micro-batch's scores; one that does not fit memory is tried once more in two halves."""
    try:
        return prepared(indices)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tokens = int(prepared.tokens.lengths[indices].sum())
        size = f"{len(indices)} pairs with {tokens} tokens"
    # Outside of the except clause: its traceback would keep the failed forward's tensors.
    empty_cache(prepared.device)
    if len(indices) > 1:
        logger.warning("A batch of %s does not fit memory; it is scored in two halves.", size)
        try:
            return torch.cat([prepared(half) for half in np.array_split(indices, 2)])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size += ", in halves too,"
    raise MemoryError(
        f"a batch of {size} does not fit memory: expected a smaller batch_size or max_length"
    )


# Where it is no torch.OutOfMemoryError: as PyTorch's allocator, C++'s and oneDNN say it on a CPU (a
# primitive's descriptor that can't be created is one that the processor has no code for); drivers
# and runtimes of GPUs ("CUDA error: out of memory", "Triton Error [HIP]: out of memory", "MPS
# backend out of memory", "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"), and their libraries, which
# allocate past PyTorch.
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|bad_alloc|could not create a primitive(?! descriptor)"
    r"|out of memory|OUT_OF_(DEVICE_|HOST_)?MEMORY|_ALLOC(ATION)?_FAILED"
    r"|cudaErrorMemoryAllocation|hipErrorOutOfMemory|rocblas_status_memory_error"
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return _NO_MEMORY.search(str(error)) is not None
