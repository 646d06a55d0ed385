"""LangChain's interface, with the real package."""

from __future__ import annotations

from pathlib import Path

import pytest

from rerank_fast import CrossEncoder
from tests.model_factory import make_tiny_bert

cross_encoders = pytest.importorskip("langchain_core.cross_encoders")

PAIRS = [("what is a panda", "a bear"), ("rain", ""), ("rain", "the sea")]


def test_it_is_a_base_cross_encoder(tmp_path: Path):
    from rerank_fast.model.protocols.langchain import LangChainCrossEncoder

    path = make_tiny_bert(tmp_path / "model")
    model = CrossEncoder(path)
    for adapter in (
        LangChainCrossEncoder(model),
        LangChainCrossEncoder(path),
        LangChainCrossEncoder(str(path)),
    ):
        assert isinstance(adapter, cross_encoders.BaseCrossEncoder)
        scores = adapter.score(PAIRS)
        assert all(type(score) is float for score in scores)
        assert scores == pytest.approx(model.predict(PAIRS).tolist(), rel=1e-5)
    assert LangChainCrossEncoder(model).score([]) == []
