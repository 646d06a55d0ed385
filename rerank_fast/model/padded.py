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
from rerank_fast.model.packed.heads import AnswerHead, Answers, cut_head, own_class
from rerank_fast.model.tokens.packing import (
    TokenizedPairs,
    row_count,
    upload,
)

logger = logging.getLogger(__name__)

# Convolutions, Fourier transforms, hashes and landmarks of attention that padding is part of,
# whatever the mask says.
_READS_PADDING = ("canine", "convbert", "fnet", "nystromformer", "yoso")


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
        self.reads_padding = _reads_padding(model)
        if self.reads_padding:
            _say_by_length(type(model).__name__)
        self.keeps_shapes = (
            model.device.type == "cpu" and dtype == torch.bfloat16 and not self.reads_padding
        )
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
        if self.reads_padding:
            changes = np.flatnonzero(np.diff(self.tokens.lengths[indices])) + 1
            scores = torch.cat([self._scores(part) for part in np.split(indices, changes)])
        elif self.keeps_shapes:
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
    return tokens.pad(
        indices,
        pad_token_id=padding_token(model) or 0,
        padding_side=_padding_side(model, tokenizer),
        pad_token_type_id=tokenizer.pad_token_type_id,
        width=width,
        device=device,
    )


def padding_token(model: Any) -> int | None:
    """The number of the token by which the model itself tells padding from text; None where it
    knows none.
    """
    pad = getattr(model.config, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else None


def scores_alone(model: Any, answers: Answers | None) -> bool:
    """Whether only a batch of one has the score that it should: the model finds the end of a text
    by its padding token, and knows none. A modular model reads what the mask says.
    """
    modular = isinstance(model, ModularReranker)
    return answers is None and not modular and padding_token(model) is None


def _reads_padding(model: Any) -> bool:
    """Whether a pair's score is another one with padding beside it."""
    inner = model.encoder if isinstance(model, ModularReranker) else model
    unmasked = "attention_mask" not in inspect.signature(inner.forward).parameters
    return unmasked or getattr(model.config, "model_type", None) in _READS_PADDING


def _padding_side(model: Any, tokenizer: Any) -> str:
    """Where padding leaves a score what it is: right of a pair, for positions are counted from the
    left; left of it where the last place is read. Of code that is not known the tokenizer says it.
    """
    modular = isinstance(model, ModularReranker)
    kind = own_class(model.encoder if modular else model)
    classifies = modular or kind.__name__.endswith("ForSequenceClassification")
    if not (classifies and kind.__module__.startswith("transformers.models.")):
        side: str = tokenizer.padding_side
        return side
    last = not modular and getattr(model.config, "summary_type", None) == "last"
    return "left" if last else "right"


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
        if len(mask) > 1 and scores_alone(model, answers):
            _say_one_by_one(type(model).__name__)
            rows = [
                {name: one[n : n + 1, mask[n]] for name, one in inputs.items()}
                for n in range(len(mask))
            ]
            return torch.cat([padded_scores(model, row, None) for row in rows])
        if model.config.is_encoder_decoder and len(parts := _by_ends(model, inputs)) > 1:
            scores = torch.cat([padded_scores(model, _rows(inputs, part), None) for part in parts])
            return scores[torch.cat(parts).argsort()]
        return model(**inputs).logits.reshape(-1).float()
    if model.config.is_encoder_decoder:
        ids = inputs["input_ids"]
        start = torch.full((len(ids), 1), start_token_id(model), device=ids.device)
        logits = model(**inputs, decoder_input_ids=start, use_cache=False).logits
        return answers.score(logits[:, -1]).float()
    if "position_ids" in inspect.signature(model.forward).parameters:  # which left padding moves
        positions = inputs["attention_mask"].cumsum(-1) - 1
        inputs = {**inputs, "position_ids": positions.clamp_min(0)}
    if head is None:
        return answers.score(model(**inputs, logits_to_keep=1).logits[:, -1]).float()
    return head(model.base_model(**inputs).last_hidden_state[:, -1]).float()


def _rows(inputs: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: one[rows] for name, one in inputs.items()}


def _by_ends(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The rows of a batch, those with as many tokens that end a text together: a classifier that
    reads the last of them asks for it, and a text may hold some of its own.
    """
    ends = (inputs["input_ids"] == model.config.eos_token_id).sum(1)
    return [torch.nonzero(ends == count).flatten() for count in ends.unique()]


@functools.cache
def _say_one_by_one(name: str) -> None:
    logger.warning(
        "This %s has no padding token: pairs are scored one by one. A pad_token_id in config.json "
        "allows batches.",
        name,
    )


@functools.cache
def _say_by_length(name: str) -> None:
    logger.warning(
        "This %s reads padding too: pairs of one length are scored together, and no others.", name
    )
