"""Pairs through the model's own forward, in padded micro-batches."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rerank_fast.model.modular.reranker import ModularReranker
from rerank_fast.model.packed.architectures import find_answer_head, start_token_id
from rerank_fast.model.packed.heads import AnswerHead, Answers, cut_head
from rerank_fast.model.tokens.packing import (
    TokenizedPairs,
    row_count,
    upload,
)

logger = logging.getLogger(__name__)


class PaddedPairs:
    """What PackedPairs does, through the model's own forward on padded micro-batches."""

    padded = True
    draws_by_row = False  # dropout masks are drawn for a micro-batch as a whole

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tokens: TokenizedPairs,
        *,
        dtype: torch.dtype,
        recomputes: bool = False,
        answers: Answers | None = None,
    ) -> None:
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self.device = model.device
        # A large one where it is not said.
        self.width = int(getattr(model.config, "hidden_size", 1024))
        self.head = None if answers is None else find_answer_head(model, answers)
        self.answers = answers
        own = next(model.parameters()).dtype
        autocasts = dtype not in (own, torch.float32)
        # oneDNN keeps half a megabyte for every shape that a bf16 weight was ever multiplied with:
        # see fill_up.
        # Else padding is read.
        masked = "attention_mask" in inspect.signature(model.forward).parameters
        self.keeps_shapes = model.device.type == "cpu" and dtype == torch.bfloat16 and masked
        # One region for all micro-batches of a step: autocast then casts the weights once.
        self.region = torch.autocast(
            model.device.type, dtype if autocasts else None, enabled=autocasts
        )
        # Autocast only narrows. Checkpointing would compute again with the model's own weights.
        self.widened: dict[str, Tensor] = {}
        if own.itemsize < dtype.itemsize and not recomputes:
            self.widened = {
                f"model.{name}": one.to(dtype)
                for name, one in (*model.named_parameters(), *model.named_buffers())
                if one.is_floating_point() and one.dtype.itemsize < dtype.itemsize
            }

    def __call__(self, indices: np.ndarray, keep: np.ndarray | None = None) -> Tensor:
        """As PackedPairs's; with keep all pairs are computed nevertheless."""
        if self.keeps_shapes:
            scores = torch.cat([self._scores(part) for part in _powers_of_two(indices)])
        else:
            scores = self._scores(indices)
        return (
            scores
            if keep is None
            else scores.index_select(0, upload(np.flatnonzero(keep), scores.device))
        )

    def _scores(self, indices: np.ndarray) -> Tensor:
        """(B,) scores of one padded batch."""
        width = self._width(int(self.tokens.lengths[indices].max(initial=1)))
        inputs = padded(
            self.tokens, indices, self.model, self.tokenizer, width=width, device=self.device
        )
        called = inputs, self.answers, self.head
        if self.widened:
            return functional_call(_Padded(self.model), self.widened, called)
        return padded_scores(self.model, *called)

    def _width(self, longest: int) -> int:
        """Of a batch whose longest pair has this many tokens."""
        if not self.keeps_shapes:
            return longest
        positions = getattr(self.model.config, "max_position_embeddings", None) or longest
        return max(longest, min(row_count(longest), positions))

    def separate(self) -> list[tuple[Tensor, Tensor]]:
        """As PackedPairs.separate."""
        return cut_head(self.head)


def _powers_of_two(indices: np.ndarray) -> list[np.ndarray]:
    """The (B,) indices in order, in parts whose sizes are powers of two, the largest first."""
    parts = []
    while len(indices):
        size = 1 << (len(indices).bit_length() - 1)
        parts.append(indices[:size])
        indices = indices[size:]
    return parts


class _Padded(nn.Module):
    """padded_scores as a module, for weights in the place of the model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: Mapping[str, Tensor], answers: Answers | None, head: AnswerHead | None
    ) -> Tensor:
        return padded_scores(self.model, inputs, answers, head)


def padded(
    tokens: TokenizedPairs,
    indices: np.ndarray,
    model: Any,
    tokenizer: Any,
    *,
    width: int | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """The pairs at the (B,) indices as a batch that the model takes, padded with what it knows for
    padding.
    """
    pad = _padding_token(model)
    return tokens.pad(
        indices,
        pad_token_id=(tokenizer.pad_token_id or 0) if pad is None else pad,
        padding_side=tokenizer.padding_side,
        pad_token_type_id=tokenizer.pad_token_type_id,
        width=width,
        device=device,
    )


def _padding_token(model: Any) -> int | None:
    """The number of the token by which the model itself tells padding from text; None where it
    knows none.
    """
    pad = getattr(model.config, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else None


def padded_scores(
    model: Any,
    inputs: Mapping[str, Tensor],
    answers: Answers | None,
    head: AnswerHead | None = None,
) -> Tensor:
    """(B,) fp32 scores of a padded batch, left-padded where a causal model answers; head is that of
    find_answer_head.
    """
    if answers is None:
        mask = inputs["attention_mask"].bool()
        # A modular model reads what the mask says, not what it knows for padding.
        if (
            len(mask) > 1
            and _padding_token(model) is None
            and not isinstance(model, ModularReranker)
        ):
            _say_one_by_one(type(model).__name__)
            rows = [
                {name: one[n : n + 1, mask[n]] for name, one in inputs.items()}
                for n in range(len(mask))
            ]
            return torch.cat([padded_scores(model, row, None) for row in rows])
        return model(**inputs).logits.reshape(-1).float()
    if model.config.is_encoder_decoder:
        ids = inputs["input_ids"]
        start = torch.full((len(ids), 1), start_token_id(model), device=ids.device)
        logits = model(**inputs, decoder_input_ids=start, use_cache=False).logits
        return answers.score(logits[:, -1]).float()
    if head is None:
        return answers.score(model(**inputs, logits_to_keep=1).logits[:, -1]).float()
    return head(model.base_model(**inputs).last_hidden_state[:, -1]).float()


@functools.cache
def _say_one_by_one(name: str) -> None:
    logger.warning(
        "This %s has no padding token: pairs are scored one by one. A pad_token_id in config.json "
        "allows batches.",
        name,
    )
