"""Tokenised pairs to scores: packed where the architecture allows it, else padded. Both keep the graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rerank_fast.model.architectures import find_architecture, reason_to_pad
from rerank_fast.model.encoder import PackedStep
from rerank_fast.model.packing import MAX_TOKENS, TokenizedPairs, plan_micro_batches

logger = logging.getLogger(__name__)

_said: set[str] = set()


class PaddedStep:
    """What PackedStep does, through the model's own forward on padded micro-batches."""

    padded = True

    def __init__(self, model: Any, tokenizer: Any, tokens: TokenizedPairs, *, dtype: torch.dtype) -> None:
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        autocasts = dtype != next(model.parameters()).dtype
        # One region for all micro-batches of a step: autocast then casts the weights once.
        self.region = torch.autocast(model.device.type, dtype if autocasts else None, enabled=autocasts)

    def __call__(self, indices: np.ndarray) -> Tensor:
        inputs = self.tokens.pad(
            indices,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            padding_side=self.tokenizer.padding_side,
            pad_token_type_id=self.tokenizer.pad_token_type_id,
            device=self.model.device,
        )
        return self.model(**inputs).logits.reshape(-1).float()


def make_step(
    model: Any, tokenizer: Any, tokens: TokenizedPairs, *, dtype: torch.dtype | None = None, packed: bool = True
) -> PackedStep | PaddedStep:
    """What scores the pairs of one step, micro-batch by micro-batch, with the weights as they are now.

    Args:
        model: a Hugging Face sequence-classification model with one label.
        tokenizer: of the model; says how to pad.
        tokens: all pairs of the step.
        dtype: of matrix products and attention; None takes the weights' own. bf16 beside fp32 weights is what
            autocast does.
        packed: False pads whatever the architecture.
    """
    weights_dtype = next(model.parameters()).dtype
    dtype = dtype or weights_dtype
    step = make_packed_step(model, tokens, dtype=dtype) if packed else None
    return step or PaddedStep(model, tokenizer, tokens, dtype=dtype)


def make_packed_step(model: Any, tokens: TokenizedPairs, *, dtype: torch.dtype | None = None) -> PackedStep | None:
    """The same, or None, and one line in the log, where the model can't run packed."""
    weights_dtype = next(model.parameters()).dtype
    dtype = dtype or weights_dtype
    served = {"cpu": {torch.float32, torch.bfloat16}, "cuda": {torch.float32, torch.bfloat16, torch.float16}}
    if not {dtype, weights_dtype} <= served.get(model.device.type, set()):
        _say_once(f"packed execution has no kernels for {dtype} on {model.device.type}")
        return None
    architecture = find_architecture(model)
    if architecture is None:
        _say_once(reason_to_pad(model))
        return None
    recompute = model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    return PackedStep(architecture, tokens, dtype=dtype, gradient_checkpointing=recompute)


def run(
    step: PackedStep | PaddedStep,
    *,
    max_pairs: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """(N,) fp32 scores of all pairs of a step, in their order, on the model's device.

    Args:
        step: from make_step.
        max_pairs: most pairs in a micro-batch; None sets no limit.
        max_tokens: most tokens in a micro-batch, with the padding where there is any; None and no max_pairs takes
            a number that suits most processors.
        progress: told the number of pairs of every micro-batch that is done.
    """
    if max_pairs is None and max_tokens is None:
        max_tokens = MAX_TOKENS
    plan = plan_micro_batches(step.tokens.lengths, max_pairs=max_pairs, max_tokens=max_tokens, padded=step.padded)
    if not plan:
        return torch.zeros(0)
    parts = []
    with step.region:
        for indices in plan:
            parts.append(step(indices))
            if progress is not None:
                progress(len(indices))
    return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(plan))).to(parts[0].device)]


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.warning("Pairs are padded and sorted by length: %s.", reason)
