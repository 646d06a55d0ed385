"""Gradients summed over all processes while backward still runs.

In place of DistributedDataParallel: its hooks sit on a module's forward, which packed execution
does not call, and it takes the mean over processes, where the loss of a global batch needs the sum
(each process's share is divided by the units of all).

What keeps processes together is that each sends the same messages in the same order, whatever it
has to compute: buckets are cut from the list of weights, which all have alike, and go out one after
the other. In this process's last backward of a step a bucket leaves as soon as its gradients and
those of all buckets before it are final; what has not left by then leaves at the end of the step,
with zeros for weights that nothing reached. So a process may have no list of a batch, or another
number of micro-batches, or begin a step anew after it ran out of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rerank_fast.training.distributed.collectives import Message, messages

_BUCKET = 6 * 2**20  # elements: 24 MiB in fp32


class GradientBuckets:
    """The gradients of weights, one step after the other.

    Args:
        weights: whose `.grad` is summed, each with the parameter whose gradient it gets: itself, or
            one of another dtype whose own hook has moved the gradient on.
    """

    def __init__(self, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        pairs = weights[::-1]  # backward reaches the last layers first
        self._hooks: list[RemovableHandle] = []
        self._weights: list[Tensor] = []
        self._buckets: list[range] = []  # places in the list of weights
        for dtype in dict.fromkeys(weight.dtype for weight, _ in pairs):
            alike = [(weight, source) for weight, source in pairs if weight.dtype == dtype]
            for cut in messages([weight for weight, _ in alike], most=_BUCKET):
                bucket = alike[cut]
                start = len(self._weights)
                self._buckets.append(range(start, start + len(bucket)))
                for place, (weight, source) in enumerate(bucket, start):
                    self._weights.append(weight)
                    hook = self._hook(len(self._buckets) - 1, place)
                    self._hooks.append(source.register_post_accumulate_grad_hook(hook))
        self._begin()

    def _begin(self) -> None:
        self._is_final = self._is_anew = False
        self._still_to_come: set[Tensor] = set()
        self._sent: list[Message] = []
        self._awaited = [set(bucket) for bucket in self._buckets]

    def final(self, shared: Sequence[Tensor] = ()) -> None:
        """The next backward is this process's last one of the step; but one more follows through
        the graphs of shared tensors, of which a call without them tells.
        """
        self._is_final = True
        self._still_to_come = _leaves(shared)

    def begin_anew(self) -> None:
        """Gradients so far are forgotten, and computed once more.

        What has left cannot come back: those buckets keep the gradients of the first time, which
        are of the same lists and the same weights, with other dropout.
        """
        sent = self._sent
        self._begin()
        self._sent, self._is_anew = sent, bool(sent)

    def release(self) -> None:
        """Gradients stay what they are from now on."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, bucket: int, place: int) -> Callable[[Tensor], None]:
        def arrived(source: Tensor) -> None:
            if bucket < len(self._sent):
                if not self._is_anew:
                    raise RuntimeError(
                        "a weight's gradient changed after it was summed over the processes: "
                        "expected one backward to add to it once; checkpointing must not be "
                        "reentrant (use_reentrant=False)"
                    )
                self._weights[place].grad = None
            elif self._is_final and source not in self._still_to_come:
                self._awaited[bucket].discard(place)
                # The last one leaves with the totals.
                while (at := len(self._sent)) < len(self._buckets) - 1 and not self._awaited[at]:
                    self._send()

        return arrived

    def _send(self, *others: Tensor) -> None:
        """The next bucket leaves, and others behind it."""
        weights = [self._weights[at] for at in self._buckets[len(self._sent)]]
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in weights]
        self._sent.append(Message([*gradients, *others]))
        for weight in weights:
            weight.grad = None  # it is in the message

    def finish(self, totals: Tensor) -> list[Tensor]:
        """Send what is left, and totals, which become their sums too; work that is enqueued from
        here on has them all.

        Returns:
            The sums of all gradients, which are the weights' `.grad` now.
        """
        while len(self._sent) < len(self._buckets) - 1:
            self._send()
        if totals.dtype == self._weights[-1].dtype:
            self._send(totals)
        else:
            self._send()
            self._sent.append(Message([totals]))
        *gradients, total = [one for message in self._sent for one in message.wait()]
        totals.copy_(total)
        for weight, gradient in zip(self._weights, gradients, strict=True):
            weight.grad = gradient
        self._begin()
        return gradients


def _leaves(tensors: Sequence[Tensor]) -> set[Tensor]:
    """Those that the graphs of tensors end in."""
    found, ahead, seen = set(), [one.grad_fn for one in tensors], set[Any]()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        ahead += [following for following, _ in node.next_functions]
    return found
