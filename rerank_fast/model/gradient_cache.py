"""Gradients of whole lists: with the graphs of all micro-batches alive, or with one at a time
(GradCache).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rerank_fast.model.preparation import Prepared
from rerank_fast.model.random_state import nothing_drawn, random_state, set_random_state
from rerank_fast.model.scoring import in_order
from rerank_fast.model.tokens.packing import upload

Loss = Callable[[Tensor], Tensor]  # (N,) scores -> ()
# Called before a step's last backward, with tensors through whose graphs one more follows.
Final = Callable[[Sequence[Tensor]], object]


def _nothing(shared: Sequence[Tensor]) -> None:
    pass


class CachedScores:
    """Scores of all pairs of a step without a graph, and each micro-batch again once their gradient
    is known.

    Memory does not grow with the pairs: one micro-batch's graph lives at a time (Gao et al. 2021,
    "Scaling deep contrastive learning batch size under memory limited setup").

    Args:
        prepared: made with gradients on: its products are those of the second run, and so the
            scores to the bit.
        plan: index arrays of the micro-batches, which hold every pair once.
        device: of the model.
        progress: told the number of pairs of every micro-batch that is done, in either run.

    Attributes:
        scores: (N,), in the order of the pairs.
        shared: what all micro-batches read, each with the leaf that stands in for it and gets its
            gradient; see PackedPairs.separate.
    """

    def __init__(
        self,
        prepared: Prepared,
        plan: Sequence[np.ndarray],
        device: torch.device,
        progress: Callable[[int], object] = lambda num_pairs: None,
    ) -> None:
        self.prepared, self.plan, self.device, self.progress = prepared, plan, device, progress
        self.shared = prepared.separate()
        self.states, parts = [random_state(device)], []
        with torch.no_grad(), prepared.region:
            for indices in plan:
                parts.append(prepared(indices))
                self.states.append(random_state(device))
                progress(len(indices))
        self.scores = in_order(parts, plan)

    def push(
        self,
        gradient: Tensor,  # (N,)
        needed: np.ndarray,  # (N,) bool
        back: Callable[[Tensor, Tensor], None] = torch.autograd.backward,
        final: Final = _nothing,
    ) -> int:
        """Run the micro-batches again, each with the random numbers of its first run, and go back
        through each.

        A pair that is not needed is not run again. The others get the dropout of their first run,
        so that the gradient is that of the scores the loss has seen. A micro-batch whose dropout is
        drawn as a whole (padded ones, and where modules of the model draw inside a layer) is left
        out as a whole or run as a whole.

        Args:
            gradient: dL/dscores.
            needed: by pair, on the host.
            back: pushes a micro-batch's (M,) gradient through the graph of its (M,) scores.
            final: called before the last of them is, with what all share.

        Returns:
            The number of pairs that were run again.
        """
        device, num_run = self.device, 0
        drawn = random_state(device)
        last = max(
            (at for at, indices in enumerate(self.plan) if needed[indices].any()), default=-1
        )
        # A new region: autocast's copies of weights, made without a graph, must not be used again.
        with torch.enable_grad(), self.prepared.region:
            states = zip(self.states[:-1], self.states[1:], strict=True)
            for at, (indices, (before, after)) in enumerate(zip(self.plan, states, strict=True)):
                keep = needed[indices]
                self.progress(len(indices))
                if not keep.any():
                    continue
                if nothing_drawn(before, after):
                    indices, keep = indices[keep], keep[keep]
                elif not self.prepared.draws_by_row:
                    keep[:] = True
                set_random_state(before, device)
                again = self.prepared(indices, keep)
                run = indices[keep]
                if at == last:
                    final([tensor for tensor, _ in self.shared])
                back(again, gradient.index_select(0, upload(run, device)))
                num_run += len(run)
        set_random_state(drawn, device)
        return num_run


@dataclass(frozen=True)
class Pushed:
    """What a backward pass leaves beside the gradients."""

    loss: Tensor  # ()
    scores: Tensor  # (N,)
    num_skipped: int = 0  # pairs that were not run again


def backward_direct(
    prepared: Prepared,
    plan: Sequence[np.ndarray],
    loss: Loss,
    *,
    scale: Loss = lambda value: value,
    final: Final = _nothing,
) -> Pushed:
    """Score all pairs, keep every graph, go back once.

    `scale` multiplies the loss before that; `final` is called when nothing is left but to go back.
    """
    with prepared.region:
        scores = in_order([prepared(indices) for indices in plan], plan)
    value = loss(scores)
    scaled = scale(value)
    final(())
    scaled.backward()
    return Pushed(value.detach(), scores.detach())


def backward_cached(
    prepared: Prepared,
    plan: Sequence[np.ndarray],
    loss: Loss,
    *,
    device: torch.device,
    scale: Loss = lambda value: value,
    skip_below: Callable[[Tensor], Tensor | float] = lambda scores: 0.0,
    final: Final = _nothing,
) -> Pushed:
    """What backward_direct does, with one micro-batch's graph at a time: see CachedScores.

    A pair whose |dL/dscore| is at most skip_below(scores), or 0, is not run again. `final` is
    called before the last micro-batch with a gradient goes back, and again before what all share.
    """
    cached = CachedScores(prepared, plan, device)
    scores = cached.scores.requires_grad_()
    value = loss(scores)
    (gradient,) = torch.autograd.grad(value, scores)
    # The one wait for the device. Not "above": a NaN must go on.
    needed = ~(gradient.abs() <= skip_below(scores.detach())).cpu().numpy()
    num_run = cached.push(scale(gradient), needed, final=final)
    shared = [(tensor, leaf) for tensor, leaf in cached.shared if leaf.grad is not None]
    if shared:
        final(())
        torch.autograd.backward([tensor for tensor, _ in shared], [leaf.grad for _, leaf in shared])
    return Pushed(value.detach(), scores.detach(), len(scores) - num_run)
