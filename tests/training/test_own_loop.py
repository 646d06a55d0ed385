"""The README's loop without the Trainer is run as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.training.conftest import make_lists

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_loop_trains(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (code,) = [block for block in blocks if "lambda_loss(" in block and "optimizer.step()" in block]
    assert len(code.splitlines()) <= 20
    lists = tmp_path / "train.jsonl"
    lists.write_text("".join(json.dumps(row) + "\n" for row in make_lists(640)))
    code = code.replace("microsoft/MiniLM-L12-H384-uncased", str(tiny_bert)).replace("train.jsonl", str(lists))
    code = code.replace("my-reranker", str(tmp_path / "out")).replace("2e-5", "5e-3")
    exec(compile(code, "README.md", "exec"), {})
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (tmp_path / "out" / "model.safetensors").exists()
