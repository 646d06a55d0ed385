from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("bm25s")

from datasets import Dataset

from rerank_fast import CrossEncoder, demo
from rerank_fast.evaluation import Comparison, RerankingEvaluator
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


def test_prints_before_and_after_and_saves_a_model(
    tiny_demo: Path, capsys: pytest.CaptureFixture[str]
):
    result = demo.run_demo(str(tiny_demo), max_steps=2)
    assert result["bm25"]["mrr@10"] == 0.5
    assert json.loads((tiny_demo / "demo.json").read_text()) == result
    for name, gain in result["after - bm25"].items():
        expected = result["after"][name] - result["bm25"][name]
        assert gain["difference"] == pytest.approx(expected)
        assert gain["low"] <= gain["difference"] <= gain["high"]
    model = CrossEncoder(tiny_demo)
    assert RerankingEvaluator(_lists(4))(model)["map"] == pytest.approx(result["after"]["map"])
    printed = capsys.readouterr().out
    for word in ("ndcg@10", "mrr@10", "map", "BM25", "before", "after"):
        assert word in printed


@pytest.mark.parametrize(
    ("low", "line"),
    [
        (0.001, "After training the model ranks the held-out modules better than BM25"),
        (0.0, "The model was not shown to rank better than BM25"),
    ],
)
def test_says_whether_it_beats_bm25(
    tiny_demo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    low: float,
    line: str,
):
    gain = Comparison(a=0.5, b=0.75, difference=0.25, low=low, high=0.5, p_value=0.01)
    monkeypatch.setattr(demo, "compare", lambda a, b, **options: gain)
    result = demo.run_demo(str(tiny_demo), max_steps=1)
    assert result["beats_bm25"] == (low > 0)
    printed = capsys.readouterr().out
    assert line in printed
    assert f"+0.2500 [{low:+.4f}, +0.5000]" in printed


@pytest.mark.skipif(
    "RERANK_FAST_DEMO" not in os.environ, reason="RERANK_FAST_DEMO names no demo's output"
)
def test_the_demo_that_ships_beats_bm25_and_answers_its_query():
    """What `rerank-fast demo` came to; .ci/run names the output of the run that it makes anyway."""
    result = json.loads((Path(os.environ["RERANK_FAST_DEMO"]) / "demo.json").read_text())
    assert result["beats_bm25"], result
    assert result["after - bm25"]["ndcg@10"]["low"] > 0
    assert result["after"]["ndcg@10"] > result["before"]["ndcg@10"]
    assert result["ranking"][0] == demo.RIGHT_DOCUMENT


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
