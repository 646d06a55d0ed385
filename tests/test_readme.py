"""What the README says is run as it stands there, on a tiny model; CI runs its installs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rerank_fast import cli
from tests.model_factory import make_tiny_bert
from tests.training.conftest import make_lists

README = Path(__file__).parents[1] / "README.md"
_TEXT = README.read_text(encoding="utf-8")
_BLOCKS = re.findall(r"```(\w+)\n(.*?)```", _TEXT, flags=re.DOTALL)
_COMMANDS = [
    line
    for kind, block in _BLOCKS
    if kind == "bash"
    for line in block.splitlines()
    if "pip install" not in line
]
_PROGRAMS = [block for kind, block in _BLOCKS if kind == "python"]
(_LOOP,) = [block for block in _PROGRAMS if "optimizer.step()" in block]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and lists, in which each piece finds what those before it have
    left.
    """
    directory = tmp_path_factory.mktemp("readme")
    make_tiny_bert(directory / "bert")
    lists = "".join(json.dumps(row) + "\n" for row in make_lists(640))
    (directory / "train.jsonl").write_text(lists)
    (directory / "eval.jsonl").write_text("".join(lists.splitlines(keepends=True)[:8]))
    return directory


def here(text: str) -> str:
    return text.replace("microsoft/MiniLM-L12-H384-uncased", "bert")


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(here(code), "README.md", "exec"), names)
    return names


def test_it_is_short():
    assert len(_TEXT.splitlines()) < 150
    (row,) = [json.loads(block) for kind, block in _BLOCKS if kind == "json"]
    assert len(row["docs"]) == len(row["labels"])


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)", _TEXT):
        assert (README.parent / link).is_file(), link


def test_its_commands_run(work: Path, monkeypatch: pytest.MonkeyPatch):
    """In their order: the second one evaluates what the first one has trained."""
    monkeypatch.chdir(work)
    assert [shlex.split(line)[:2] for line in _COMMANDS] == [
        ["rerank-fast", "train"],
        ["rerank-fast", "evaluate"],
    ]
    few = ["--max_steps", "2", "--show_progress_bar", "false"]
    for line, more in zip(_COMMANDS, (few, []), strict=True):
        assert cli.main([*shlex.split(here(line))[1:], *more]) == 0


@pytest.mark.parametrize("code", [one for one in _PROGRAMS if one != _LOOP])
def test_its_programs_run(code: str, work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(work)
    make_tiny_bert(work / "my-reranker", max_positions=64)
    code = code.replace(
        'output="my-reranker"', 'output="trained", overwrite=True, max_steps=2, precision="fp32"'
    )
    names = run(code)
    if "ranking" in names:
        assert {hit["corpus_id"] for hit in names["ranking"]} == {0, 1}
    if "result" in names:
        assert names["result"].steps == 2


def test_its_loop_trains(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(work)
    assert len(_LOOP.splitlines()) <= 20
    run(_LOOP.replace("my-reranker", "out").replace("2e-5", "5e-3"))
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (work / "out" / "model.safetensors").exists()
