"""What mining asks of a retriever."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Found:
    """The best documents of Q queries, by descending score."""

    indices: np.ndarray  # (Q, k) int64 in the corpus; -1 where fewer than k were found
    scores: np.ndarray  # (Q, k) fp32; -inf where the index is -1
    positive_scores: list[np.ndarray]  # Q times (P,) fp32, of each query's positives


@runtime_checkable
class Retriever(Protocol):
    """First stage of mining."""

    def settings(self) -> dict[str, Any]:
        """Whatever decides the results, as JSON values: a mining run continues only where it is the
        same.
        """

    def index(
        self, corpus: Sequence[str], queries: Sequence[str], *, show_progress_bar: bool
    ) -> None:
        """Make ready to search the corpus for any of the queries."""

    def search(self, start: int, stop: int, k: int, positives: Sequence[Sequence[int]]) -> Found:
        """The k best documents of queries start to stop, and the scores of their positives in the
        corpus.
        """


def text_fingerprint(texts: Iterable[str]) -> str:
    """A hash of texts and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def _weights(model: nn.Module) -> dict[str, Any]:
    """State and int8 weights, which are not part of it."""
    weights = dict(model.state_dict())
    for name, part in model.named_modules():
        quantized: Any = getattr(part, "weight", None)
        if hasattr(quantized, "scale"):
            weights |= {f"{name}.values": quantized.values, f"{name}.scale": quantized.scale}
    return weights


def model_fingerprint(model: Any, name: str | None = None) -> str:
    """A name for a model's outputs: of a torch module, a hash of its weights; of others, the given
    name or type.
    """
    title = name or str(getattr(model, "__qualname__", type(model).__qualname__))
    if not isinstance(model, nn.Module):
        return title
    digest = hashlib.blake2b(digest_size=16)
    # What else changes the scores of the same weights.
    for attribute in (
        "max_seq_length",
        "max_length",
        "prompts",
        "default_prompt_name",
        "truncate_dim",
    ):
        digest.update(repr(getattr(model, attribute, None)).encode())
    digest.update(type(getattr(model, "activation_fn", None)).__qualname__.encode())
    for key, value in sorted(_weights(model).items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{title}-{digest.hexdigest()}"
