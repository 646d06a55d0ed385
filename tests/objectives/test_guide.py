"""docs/add_a_loss.md, followed: each of its blocks does what it says."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from rerank_fast import TrainingConfig, cli
from rerank_fast.objectives import NAMES
from rerank_fast.training.objective import choose_objective
from tests.model_factory import make_tiny_bert

GUIDE = Path(__file__).parents[2] / "docs" / "add_a_loss.md"
FILE, LINE, COMMAND, SEVERAL, OWN, WEIGHTING = (
    block
    for _, block in re.findall(r"```(python|bash|yaml)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and lists, in which the guide's new loss is a file and a line of the
    package.
    """
    make_tiny_bert(tmp_path / "bert")
    row = {"query": "what is the panda", "docs": ["a panda is a bear", "fish"], "labels": [1, 0]}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 8)
    (tmp_path / "margin.py").write_text(FILE)
    module = "rerank_fast.objectives.margin"
    spec = importlib.util.spec_from_file_location(module, tmp_path / "margin.py")
    monkeypatch.setitem(sys.modules, module, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[module])
    monkeypatch.setitem(NAMES, "margin", "")
    exec(LINE, {"NAMES": NAMES})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def here(block: str) -> str:
    return block.replace("microsoft/MiniLM-L12-H384-uncased", "bert")


def test_the_new_loss_is_chosen_by_name(work: Path):
    _, *arguments = shlex.split(here(COMMAND).replace("\\\n", " "))
    assert cli.main([*arguments, "--show_progress_bar", "false", "--precision", "fp32"]) == 0
    assert '"margin": 0.5' in (work / "my-reranker" / "README.md").read_text()
    several = choose_objective(TrainingConfig(**yaml.safe_load(SEVERAL)))
    assert [
        (one.name, weight) for one, weight in zip(several.parts, several.weights, strict=True)
    ] == [
        ("margin", 0.5),
        ("lambda_loss", 1.0),
    ]
    assert several.parts[0].margin == 2.0


def test_and_trains_without_a_name(work: Path):
    names = {"Margin": sys.modules["rerank_fast.objectives.margin"].Margin}
    for block in (OWN, WEIGHTING):
        exec(here(block), names)
    for output in ("my-reranker", "by-discount"):
        assert (work / output / "model.safetensors").is_file()
