"""Several processes as one: sums of gradients, one evaluation over all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.tokens.packing import TokenizedPairs, upload

_MESSAGE = 32 * 2**20  # elements
_ALIGNED = 16  # elements


def join_processes(timeout: float) -> PartialState:
    """This process among those of `accelerate launch` or torchrun; alone without them.

    A peer that dies closes its connections: the next collective fails at once, and the launcher
    ends the rest. The timeout, in seconds, is for one that hangs.

    Raises:
        ValueError: launched in several processes that do not find each other.
    """
    # Not Accelerator: its precision is one per process, and a second run may want another. Without
    # an accelerator it must be told so: it would run each process alone.
    on_cpu = (
        os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true")
        or not torch.accelerator.is_available()
    )
    state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise ValueError(
            f"launched in {launched} processes, but Accelerate was set up before for "
            f"{state.num_processes}"
        )
    return state


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in few large messages."""
    if not several():
        return
    under_way: list[tuple[list[Tensor], Message]] = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [one for one in tensors if one.dtype == dtype]
        for part in messages(alike):
            message = Message(alike[part])  # copied in while the one before travels
            if under_way:
                _receive(*under_way.pop())
            under_way.append((alike[part], message))
    for one in under_way:
        _receive(*one)


def _receive(tensors: list[Tensor], message: Message) -> None:
    torch._foreach_copy_(tensors, message.wait())


def messages(tensors: Sequence[Tensor], most: int | None = None) -> list[slice]:
    """Where tensors are cut into messages: of one tensor, or as many as stay below a number of
    elements.
    """
    most = _MESSAGE if most is None else most
    parts, start, size = [], 0, 0
    for end, tensor in enumerate(tensors):
        if end > start and size + tensor.numel() > most:
            parts.append(slice(start, end))
            start, size = end, 0
        size += tensor.numel()
    return [*parts, slice(start, len(tensors))]


class Message:
    """Tensors of one dtype on their way to be summed over all processes, copied in by one copy of
    all of them.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        sizes = [tensor.numel() for tensor in tensors]
        # Each begins where kernels take several elements at once.
        rooms = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
        flat = tensors[0].new_empty(sum(rooms))
        self._sums = [
            part[:size].view(tensor.shape)
            for part, size, tensor in zip(flat.split(rooms), sizes, tensors, strict=True)
        ]
        torch._foreach_copy_(self._sums, list(tensors))
        self._work: Any = dist.all_reduce(flat, async_op=True)

    def wait(self) -> list[Tensor]:
        """The sums, in the order of the tensors; work that is enqueued from here on has them."""
        self._work.wait()
        return self._sums


class LateFlag:
    """A number of the device as a flag of the host that is read a step later: nothing waits for the
    step in between.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def put(self, value: Tensor) -> None:
        """A () tensor, whose copy is under way from now on."""
        if not value.is_cuda:
            self._value = value.detach().clone()
            return
        self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
        self._value.copy_(value.detach(), non_blocking=True)
        self._arrived = torch.cuda.current_stream(value.device).record_event()

    def get(self) -> bool:
        """Whether what was put last is above 0; False before the first."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value is not None and bool(self._value > 0)


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Every process gets the first one's values."""
    if several():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def gather(value: Any) -> list[Any]:
    """The value of every process, in every process."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def several() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the one that reads and writes for all."""
    return not several() or dist.get_rank() == 0


class ShardedScorer:
    """A CrossEncoder as evaluators see it, whose pairs are scored by all processes together.

    Each pair by one process, none left out; every process gets all scores, and so the same metrics.
    """

    def __init__(self, model: CrossEncoder, state: PartialState) -> None:
        self._model, self._state = model, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def score_tokens(
        self, tokens: TokenizedPairs, *, activation_fn: Any = None, **options: Any
    ) -> Tensor:
        """(N,) fp32 scores of tokenised pairs, in their order, in every process.

        Each scores its share of them: all must call it with the same tokens. The options are those
        of CrossEncoder.score_tokens.
        """
        # Each takes every n-th pair by length: equal loads, and equal ones next to each other.
        mine = np.argsort(-tokens.lengths, kind="stable")[
            self._state.process_index :: self._state.num_processes
        ]
        scores = torch.zeros(len(tokens), dtype=torch.float32, device=self._model.device)
        if len(mine):
            raw = self._model.score_tokens(
                tokens.select(mine), activation_fn=torch.nn.Identity(), **options
            )
            scores.index_copy_(0, upload(mine, scores.device), raw)
        sum_over_processes([scores])  # the others' are 0: nothing is rounded
        return self._model.activated(scores, activation_fn)

    def predict(
        self, pairs: Sequence[Any], *, convert_to_tensor: bool = False, **options: Any
    ) -> Any:
        """As CrossEncoder.predict for a sequence of pairs."""
        options.pop("convert_to_numpy", None)
        scores = self.score_tokens(self._model.tokenize(pairs), **options)
        return scores if convert_to_tensor else scores.cpu().numpy()
