"""Tokenised pairs to scores: packed where the architecture allows it, else padded. Both keep the graph."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rerank_fast.model.architectures import find_architecture, reason_to_pad
from rerank_fast.model.encoder import PackedStep
from rerank_fast.model.packing import TokenizedPairs

logger = logging.getLogger(__name__)

_said: set[str] = set()


class PaddedStep:
    """What PackedStep does, through the model's own forward on padded micro-batches."""

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
    if model.device.type != "cpu" or not {dtype, weights_dtype} <= {torch.float32, torch.bfloat16}:
        _say_once(f"packed execution is for the CPU in fp32 or bf16, not {dtype} on {model.device.type}")
        return None
    architecture = find_architecture(model)
    if architecture is None:
        _say_once(reason_to_pad(model))
        return None
    recompute = model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    return PackedStep(architecture, tokens, dtype=dtype, gradient_checkpointing=recompute)


def run(step: PackedStep | PaddedStep, plan: Iterable[np.ndarray]) -> Tensor:
    """(N,) fp32 scores of the pairs of a plan, in the order of the pairs, on the model's device."""
    done, parts = [], []
    with step.region:
        for indices in plan:
            done.append(indices)
            parts.append(step(indices))
    if not parts:
        return torch.zeros(0)
    return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(done))).to(parts[0].device)]


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.warning("Pairs are padded and sorted by length: %s.", reason)
