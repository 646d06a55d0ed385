from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("bm25s")

from datasets import Dataset

from rerank_fast import CrossEncoder, demo
from rerank_fast.evaluation import RerankingEvaluator
from tests.model_factory import make_tiny_bert


def _lists(number: int) -> Dataset:
    row = {
        "query": "what is a panda",
        "docs": ["a kind of bear", "rain and wind", "the sea"],
        "labels": [0.0, 1.0, 0.0],
    }
    return Dataset.from_list([row] * number)


@pytest.fixture
def tiny_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo with a tiny encoder and task; returns where to put the model."""
    encoder = make_tiny_bert(tmp_path / "encoder", head=False, max_positions=96)
    monkeypatch.setattr(demo, "encoder_directory", lambda: str(encoder))
    monkeypatch.setattr(demo, "build_docstring_lists", lambda **options: (_lists(8), _lists(4)))
    return tmp_path / "demo"


def test_prints_before_and_after_and_saves_a_model(tiny_demo: Path, capsys: pytest.CaptureFixture[str]):
    result = demo.run_demo(str(tiny_demo), max_steps=2)
    assert {"bm25", "before", "after"} <= set(result)
    assert result["bm25"]["mrr@10"] == 0.5
    model = CrossEncoder(tiny_demo)
    assert RerankingEvaluator(_lists(4))(model)["map"] == pytest.approx(result["after"]["map"])
    printed = capsys.readouterr().out
    for word in ("ndcg@10", "mrr@10", "map", "BM25", "before", "after"):
        assert word in printed


def test_replaces_its_own_model_and_no_other(tiny_demo: Path):
    demo.run_demo(str(tiny_demo), max_steps=1)
    demo.run_demo(str(tiny_demo), max_steps=1)
    other = make_tiny_bert(tiny_demo.parent / "other")
    with pytest.raises(ValueError, match="already holds a model"):
        demo.run_demo(str(other), max_steps=1)


def test_without_the_extra_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'rerank-fast\[demo\]'"):
        demo.run_demo(str(tmp_path / "demo"), max_steps=1)
