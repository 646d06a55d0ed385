"""Gradients of whole lists: with the graphs of all micro-batches alive, or with one at a time (GradCache)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rerank_fast.model.encoder import PackedStep
from rerank_fast.model.packing import upload
from rerank_fast.model.random_state import nothing_drawn, random_state, set_random_state
from rerank_fast.model.scoring import PaddedStep, in_order

Loss = Callable[[Tensor], Tensor]  # (N,) scores -> ()


@dataclass(frozen=True)
class Pushed:
    """What a backward pass leaves beside the gradients."""

    loss: Tensor  # ()
    scores: Tensor  # (N,)
    num_skipped: int = 0  # pairs that were not run again


def backward_direct(
    step: PackedStep | PaddedStep,
    plan: Sequence[np.ndarray],
    loss: Loss,
    *,
    scale: Loss = lambda value: value,
) -> Pushed:
    """Score all pairs, keep every graph, go back once. `scale` multiplies the loss before that."""
    with step.region:
        scores = in_order([step(indices) for indices in plan], plan)
    value = loss(scores)
    scale(value).backward()
    return Pushed(value.detach(), scores.detach())


def backward_cached(
    step: PackedStep | PaddedStep,
    plan: Sequence[np.ndarray],
    loss: Loss,
    *,
    device: torch.device,
    scale: Loss = lambda value: value,
    skip_below: Callable[[Tensor], Tensor | float] = lambda scores: 0.0,
) -> Pushed:
    """The same gradient with one micro-batch's graph at a time: memory does not grow with the lists.

    All micro-batches are scored without a graph; the loss gives dL/dscores; then each is run again, with the random
    numbers of its first run, and its share of dL/dscores is pushed through its graph (Gao et al. 2021, "Scaling
    deep contrastive learning batch size under memory limited setup").

    A pair whose |dL/dscore| is at most skip_below(scores), or 0, is not run again. The others get the dropout of
    their first run, so that the gradient is that of the scores the loss has seen. A micro-batch whose dropout is
    drawn as a whole (padded ones, and where modules of the model draw inside a layer) is left out as a whole or run
    as a whole.
    """
    # The step was made with gradients on: its products are those of the second run, and so the scores to the bit.
    shared = step.separate()
    states, parts = [random_state(device)], []
    with torch.no_grad(), step.region:
        for indices in plan:
            parts.append(step(indices))
            states.append(random_state(device))
    scores = in_order(parts, plan).requires_grad_()
    value = loss(scores)
    (gradient,) = torch.autograd.grad(value, scores)
    # The one wait for the device. Not "above": a NaN must go on.
    needed = ~(gradient.abs() <= skip_below(scores.detach())).cpu().numpy()
    gradient, num_run = scale(gradient), 0
    # A new region: autocast's copies of weights, made without a graph, must not be used again.
    with step.region:
        for indices, before, after in zip(plan, states[:-1], states[1:], strict=True):
            keep = needed[indices]
            if not keep.any():
                continue
            if nothing_drawn(before, after):
                indices, keep = indices[keep], keep[keep]
            elif not step.draws_by_row:
                keep[:] = True
            set_random_state(before, device)
            again = step(indices, keep)
            run = indices[keep]
            again.backward(gradient.index_select(0, upload(run, device)))
            num_run += len(run)
    set_random_state(states[-1], device)
    shared = [(tensor, leaf) for tensor, leaf in shared if leaf.grad is not None]
    if shared:
        torch.autograd.backward([tensor for tensor, _ in shared], [leaf.grad for _, leaf in shared])
    return Pushed(value.detach(), scores.detach(), len(scores) - num_run)
