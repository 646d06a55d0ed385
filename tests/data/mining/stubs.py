"""Encoders and cross-encoders with fixed outputs, in sentence-transformers' interface and as plain
callables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, normalize


class FixedEncoder:
    """A SentenceTransformer as far as mining uses one: each text has its own random embedding."""

    device = torch.device("cpu")

    def similarity(self, a: Any, b: Any) -> torch.Tensor:
        return normalize(torch.as_tensor(a)) @ normalize(torch.as_tensor(b)).T

    def similarity_pairwise(self, a: Any, b: Any) -> torch.Tensor:
        return cosine_similarity(torch.as_tensor(a), torch.as_tensor(b))

    def __init__(self, texts: Sequence[str], *, seed: int = 0, width: int = 8) -> None:
        draw = np.random.default_rng(seed)
        self.table = {
            text: draw.normal(size=width).astype(np.float32) for text in dict.fromkeys(texts)
        }
        self.model_card_data = SimpleNamespace(base_model="fixed")
        self.encoded: list[str] = []

    def encode(
        self, texts: Sequence[str], *, normalize_embeddings: bool = False, **_: Any
    ) -> np.ndarray:
        self.encoded += texts
        rows = np.stack([self.table[text] for text in texts])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize_embeddings else rows

    encode_query = encode_document = encode


class FixedCrossEncoder:
    """Scores drawn once per pair."""

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self.table: dict[tuple[str, str], float] = {}
        self.batches: list[int] = []

    def predict(
        self, pairs: Sequence[Sequence[str]], *, convert_to_tensor: bool = False, **_: Any
    ) -> Any:
        self.batches.append(len(pairs))
        scores = [self._score(pair[0], pair[1]) for pair in pairs]
        return torch.tensor(scores) if convert_to_tensor else np.array(scores, np.float32)

    def _score(self, query: str, document: str) -> float:
        key = sum((i + 1) * code for i, code in enumerate(f"{query}|{document}".encode()))
        return self.table.setdefault(
            (query, document), float(np.random.default_rng([self.seed, key]).normal())
        )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_query(path: Path) -> dict[str, dict[str, float]]:
    """query -> document -> label."""
    return {row["query"]: dict(zip(row["docs"], row["labels"], strict=True)) for row in read(path)}
