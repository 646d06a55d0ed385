"""The guides to adding something, followed: each block does what its page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rerank_fast import CrossEncoder, TrainingConfig
from rerank_fast.data import load_lists
from rerank_fast.objectives.lambda_loss import LambdaLoss
from tests.docs.guides import ROOT, blocks, follow
from tests.model_factory import make_tiny_bert
from tests.training.conftest import make_lists

PAGES = sorted((ROOT / "docs").glob("add_*.md"))


def module(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of the guide's as a module of the package."""
    made = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(code, name, "exec"), made.__dict__)
    return made


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_tiny_bert(tmp_path / "my-encoder")
    make_lists(16).to_json(tmp_path / "train.jsonl")
    make_lists(12, seed=1).to_json(tmp_path / "eval.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_places_in_tables_are_there(page: Path):
    """| `file` | `what is to be found in it` | ..."""
    for file, found in re.findall(r"^\| `([\w./]+)` \| `([^`]+)` \|", page.read_text(), re.M):
        assert found in (ROOT / file).read_text(encoding="utf-8"), (file, found)


def test_their_script_and_ours(work: Path):
    """Both run, and what either saves the other opens."""
    theirs, ours = (
        code.replace("microsoft/MiniLM-L12-H384-uncased", "my-encoder")
        for code in blocks("from_sentence_transformers.md", "python")
    )
    exec(theirs, {})
    CrossEncoder("my-reranker/final")
    exec(ours.replace('output="my-reranker"', 'output="ours"'), {})
    from sentence_transformers import CrossEncoder as TheirCrossEncoder

    TheirCrossEncoder("ours")


def test_each_setting_is_told_when_to_use():
    pages = [
        (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for name in ("training", "objectives", "distributed", "gpus")
    ]
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", "\n".join(pages)))))
    assert {one.name for one in fields(TrainingConfig)} <= named


def test_a_scheme(work: Path):
    own, train, drop_in = blocks("add_a_scheme.md", "python")
    known: dict[str, Any] = {"model": None}
    exec(own, known)
    loss = LambdaLoss(scheme=known["ARPLoss2"]())
    scores = torch.tensor([0.5, 2.0, -1.0, 0.25, 1.0], dtype=torch.float64)
    labels = torch.tensor([2.0, 0.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    by_hand = sum(
        (labels[i] - labels[j]) * -torch.nn.functional.logsigmoid(scores[i] - scores[j])
        for start, stop in ((0, 3), (3, 5))
        for i in range(start, stop)
        for j in range(start, stop)
        if labels[i] > labels[j]
    )
    found = loss(scores, labels, torch.tensor([0, 3, 5])).total
    assert found.item() == pytest.approx(by_hand.item() / np.log(2), rel=1e-6)
    exec(train, known)
    assert "ARPLoss2(power=1.0)" in Path("by-position", "README.md").read_text()
    from sentence_transformers import CrossEncoder as TheirCrossEncoder

    exec(drop_in, known | {"model": TheirCrossEncoder("my-encoder", device="cpu")})


def test_an_architecture(monkeypatch: pytest.MonkeyPatch):
    transformers = pytest.importorskip("transformers", reason="with ERNIE")
    from rerank_fast.model.packed import architectures
    from tests.model.packed import test_encoder

    file, lines, entry = blocks("add_an_architecture.md", "python")
    made = module("rerank_fast.model.packed.architectures.ernie", file, monkeypatch)
    monkeypatch.setattr(architectures, "_BODIES", {**architectures._BODIES})
    monkeypatch.setattr(architectures, "_READINGS", {**architectures._READINGS})
    names = {**vars(architectures), "ernie_reading": made.ernie_reading}
    models = {**test_encoder.MODELS}
    monkeypatch.setattr(test_encoder, "MODELS", models)
    ernie = {name: getattr(transformers, name) for name in (
        "ErnieForSequenceClassification", "ErnieConfig"
    )}  # fmt: skip
    exec(entry, {"MODELS": models, "SIZES": test_encoder.SIZES, **ernie})
    model = test_encoder.make_model("ernie")
    assert "does not know ErnieForSequenceClassification" in architectures.reason_to_pad(model)
    exec(lines, names)
    assert architectures.reason_to_pad(model) == ""
    test_encoder.test_scores_and_gradients_equal_the_padded_model("ernie", True)
    # A part that is called otherwise, or is gone, is named, and the model padded.
    model.ernie.pooler.fully_connected = model.ernie.pooler._modules.pop("dense")
    assert "dense" in architectures.reason_to_pad(model)


def test_a_backend(tmp_path: Path):
    """In a copy of the package, with the page's changes made to it."""
    (check,) = blocks("add_a_backend.md", "python")
    check += (
        "\nmeta = [one.to('meta') for one in (scores, labels, offsets)]\n"
        "try:\n    ndcg(*meta, backend='numpy')\n"
        "except ValueError as error:\n    print(error)\n"
        "bad = torch.tensor([float('nan'), 1.0])\n"
        "found = ndcg(bad, labels[:2].float(), torch.tensor([0, 2]), backend='numpy')\n"
        "print(found.isnan().all())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        cwd=follow("add_a_backend.md", tmp_path),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, nan = done.stdout.splitlines()
    assert refused == "backend 'numpy' takes CPU tensors, got tensors on meta"
    assert nan == "tensor(True)"


def test_a_layout(work: Path, monkeypatch: pytest.MonkeyPatch):
    from rerank_fast.data.layouts import choice

    file, order = blocks("add_a_layout.md", "python")
    made = module("rerank_fast.data.layouts.candidates", file, monkeypatch)
    names = {**vars(choice), "candidates": made}
    exec(order, names)
    # Nothing that is there is forgotten, or changes its order.
    assert [one for one in names["LAYOUTS"] if one is not made] == [*choice.LAYOUTS]
    monkeypatch.setattr(choice, "LAYOUTS", names["LAYOUTS"])
    row = {"question": "rain", "candidates": [{"text": "wet", "is_answer": True}]}
    row["candidates"].append({"text": "sun", "is_answer": False})
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    assert [*load_lists("rows.jsonl")] == [
        {"query": "rain", "docs": ["wet", "sun"], "labels": [1.0, 0.0]}
    ]
    assert made.matches(json.loads(made.EXAMPLE.replace('"..."', '"x"')))
    for broken in ({"text": "sun"}, "sun", {"text": 3, "is_answer": True}):
        row["candidates"][1] = broken
        Path("rows.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=r"rows\.jsonl.*1.*candidates\[1\]"):
            load_lists("rows.jsonl")
    row["candidates"] = []
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="candidates: no documents"):
        load_lists("rows.jsonl")


def test_a_metric(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    from rerank_fast.evaluation import ties
    from tests.evaluation import test_ties

    named, own, train, form = blocks("add_a_metric.md", "python")
    known: dict[str, Any] = {"model": CrossEncoder("my-encoder", device="cpu")}
    exec(named, known)
    assert "'base_Rprec'" in capsys.readouterr().out
    exec(own, known)
    exec(train, known)
    assert "worst_ndcg@10" in Path("my-reranker", "README.md").read_text()
    values = known["evaluator"].evaluate_per_query(CrossEncoder("my-reranker"))["ndcg@10"]
    assert known["WorstQueries"]("eval.jsonl")(CrossEncoder("my-reranker"))[
        "worst_ndcg@10"
    ] == pytest.approx(values.min())
    monkeypatch.setattr(ties, "_FORMS", {**ties._FORMS})
    exec(form, {**vars(ties)})
    monkeypatch.setattr(test_ties, "EXACT", ["Rprec", "Rprec(rel=2)"])
    for seed in range(4):
        test_ties.test_the_mean_over_all_orders(seed)
