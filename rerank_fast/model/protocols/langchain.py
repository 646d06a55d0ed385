"""LangChain's BaseCrossEncoder: `from rerank_fast.model.protocols.langchain import
LangChainCrossEncoder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.cross_encoders import BaseCrossEncoder

from rerank_fast.model.cross_encoder import CrossEncoder


class LangChainCrossEncoder(BaseCrossEncoder):
    """What a CrossEncoderReranker of LangChain takes for its model.

    Args:
        model: a CrossEncoder, or the path or hub id of one.
        options: of CrossEncoder.predict.
    """

    def __init__(self, model: CrossEncoder | str | Path, **options: Any) -> None:
        self.model = model if isinstance(model, CrossEncoder) else CrossEncoder(model)
        self.options = options

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """The scores of (query, document) pairs, in their order."""
        scores: list[float] = self.model.predict(text_pairs, **self.options).tolist()
        return scores
