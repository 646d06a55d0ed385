"""Gradients of whole lists: with the graphs of all micro-batches alive, or with one at a time (GradCache)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from rerank_fast.data.tokenized import TokenizedLists
from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.encoder import PackedStep
from rerank_fast.model.packing import plan_micro_batches
from rerank_fast.model.scoring import PaddedStep
from rerank_fast.ops.lambda_loss import count_pairs, lambda_loss
from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.run_log import Rates

Loss = Callable[[Tensor], Tensor]  # (N,) scores -> ()


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16-pure": torch.bfloat16}


class Backward:
    """Lists to gradients, as a run's settings say.

    Args:
        model: whose weights get the gradients.
        config: loss, micro-batches, precision; gradient_cache "auto" keeps all graphs while they are estimated to
            fit half of the memory that is free now (see activation_bytes).
        scale: multiplies the loss before it goes back.
        max_tokens: of a micro-batch.
    """

    def __init__(self, model: CrossEncoder, config: TrainingConfig, scale: Loss, max_tokens: int) -> None:
        self.model, self.config, self.scale, self.max_tokens = model, config, scale, max_tokens
        self.dtype = DTYPES[config.precision]
        # Gradients and both of AdamW's moments are still to come, 4 bytes each.
        state = 12 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        self.memory = (available_bytes(model.device) - state) // 2

    def __call__(self, lists: TokenizedLists, divisor: float, rates: Rates) -> tuple[Tensor, Tensor]:
        """Add the gradient of the lists' summed loss over the divisor; returns that loss, and the pairs under k."""
        config, device = self.config, self.model.device
        labels, offsets = (torch.from_numpy(array).to(device) for array in (lists.labels, lists.list_offsets))
        loss: Any = functools.partial(
            lambda_loss,
            labels=labels,
            offsets=offsets,
            scheme=config.scheme,
            k=config.k,
            sigma=config.sigma,
            mu=config.mu,
            eps=config.eps,
            reduction_log=config.reduction_log,
            reduction="sum",
        )
        step = self.model.step(lists.pairs, dtype=self.dtype)
        lengths = step.tokens.lengths
        plan = plan_micro_batches(
            lengths,
            max_pairs=config.mini_batch_size,
            max_tokens=self.max_tokens,
            padded=step.padded,
        )
        tokens = int(lengths.sum())
        padded_tokens = sum(len(part) * int(lengths[part[0]]) for part in plan) if step.padded else tokens
        cached = config.gradient_cache == "on"
        if config.gradient_cache == "auto":
            cached = self.memory < activation_bytes(
                self.model.model, padded_tokens, self.dtype, gradient_checkpointing=config.gradient_checkpointing
            )
        options = {"device": device, "skip_below": config.skip_below} if cached else {}
        push: Any = backward_cached if cached else backward_direct
        pushed = push(step, plan, lambda scores: loss(scores) / divisor, scale=self.scale, **options)
        rates.scored += len(lists.pairs)
        rates.skipped += pushed.num_skipped
        rates.tokens += tokens
        rates.padded_tokens += padded_tokens
        if not config.k:  # then the labels alone say how many, and the divisor holds them already
            return pushed.loss, torch.zeros((), device=device)
        return pushed.loss, count_pairs(pushed.scores, labels, offsets, scheme=config.scheme, k=config.k)


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
        scores = _in_order([step(indices) for indices in plan], plan)
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
    skip_below: float = 0.0,
) -> Pushed:
    """The same gradient with one micro-batch's graph at a time: memory does not grow with the lists.

    All micro-batches are scored without a graph; the loss gives dL/dscores; then each is run again, with the random
    numbers of its first run, and its share of dL/dscores is pushed through its graph (Gao et al. 2021, "Scaling
    deep contrastive learning batch size under memory limited setup").

    A pair whose |dL/dscore| is at most skip_below is not run again. Dropout masks depend on a micro-batch's
    composition: one that drew random numbers is left out as a whole or run again as a whole, so that the gradient
    is that of the scores the loss has seen.
    """
    # The step was made with gradients on: its products are those of the second run, and so the scores to the bit.
    shared = step.separate()
    states, parts = [_random_state(device)], []
    with torch.no_grad(), step.region:
        for indices in plan:
            parts.append(step(indices))
            states.append(_random_state(device))
    scores = _in_order(parts, plan).requires_grad_()
    value = loss(scores)
    (gradient,) = torch.autograd.grad(value, scores)
    # The one wait for the device. Not "above": a NaN must go on.
    needed = ~(gradient.abs() <= skip_below).cpu().numpy()
    gradient, num_run = scale(gradient), 0
    # A new region: autocast's copies of weights, made without a graph, must not be used again.
    with step.region:
        for indices, before, after in zip(plan, states[:-1], states[1:], strict=True):
            if not needed[indices].any():
                continue
            if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                indices = indices[needed[indices]]
            _set_random_state(before, device)
            again = step(indices)
            again.backward(gradient[torch.from_numpy(indices).to(device)])
            num_run += len(indices)
    _set_random_state(states[-1], device)
    shared = [(tensor, leaf) for tensor, leaf in shared if leaf.grad is not None]
    if shared:
        torch.autograd.backward([tensor for tensor, _ in shared], [leaf.grad for _, leaf in shared])
    return Pushed(value.detach(), scores.detach(), len(scores) - num_run)


def _in_order(parts: list[Tensor], plan: Sequence[np.ndarray]) -> Tensor:
    """(N,) scores of all micro-batches in the order of the pairs."""
    return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(plan))).to(parts[0].device)]


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the generators that a forward pass may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


# Activations that a layer keeps, in bytes per token and unit of width in 16 bits, attention's own matrices left out
# (Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", section 4.1).
_BYTES_PER_UNIT = 34


def activation_bytes(model: Any, num_tokens: int, dtype: torch.dtype, *, gradient_checkpointing: bool) -> int:
    """About what the graphs of this many tokens take; with checkpointing only the inputs of the layers are kept."""
    config = model.config
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    per_unit = (4 + dtype.itemsize) if gradient_checkpointing else _BYTES_PER_UNIT * dtype.itemsize // 2
    return num_tokens * layers * width * per_unit


def available_bytes(device: torch.device) -> int:
    """Memory that is free now on the device; on a CPU also what its control group leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    left = _control_group_bytes()
    return free if left is None else min(free, left)


@functools.cache
def _control_group() -> tuple[Path, Path] | None:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        root = Path("/sys/fs/cgroup")
        if (root / limit).is_file() and (root / used).is_file():
            return root / limit, root / used
    return None


def _control_group_bytes() -> int | None:
    files = _control_group()
    if files is None:
        return None
    limit, used = (file.read_text().strip() for file in files)
    return int(limit) - int(used) if limit.isdigit() else None
