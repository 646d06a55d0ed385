"""Every packed family is measured beside itself padded, and a run goes on where it was
interrupted.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.results import Row, Run
from benchmarks.steps import families
from benchmarks.steps.families import Size
from rerank_fast.model.packed.architectures import find_architecture
from rerank_fast.model.packed.heads import Answers
from tests.model.family_table import FAMILIES, made

SMALL = Size(2, 32, 4, 1, 1)


def test_every_family_of_the_table_is_there():
    assert list(families.FAMILIES) == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_packed_and_of_the_class_that_the_table_names(family: str):
    model = families.make_model(family, SMALL)
    assert type(model) is type(made(FAMILIES[family]))
    answers = Answers(5, 9) if model.config.is_encoder_decoder else None
    architecture = find_architecture(model, answers)
    assert architecture is not None
    assert len(architecture.layers) == SMALL.layers
    assert architecture.word_embeddings.weight.shape == (families.VOCABULARY, SMALL.width)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", ["BERT", "T5 1.1 (monoT5)"])
def test_rows_of_a_family(family: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(families.SIZES, "small", SMALL)
    rows = families.measure(family, "small", [64, 512])
    assert [row.case.partition(": ")[2] for row in rows] == [
        "step",
        "step, peak",
        "predict",
        "predict, peak",
    ]
    assert all(row.table == families.TABLE and row.ours > 0 and row.peer for row in rows)
    assert "pairs of" in rows[0].remark


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_fails_padded_in_bf16_is_beside_itself_in_fp32(monkeypatch: pytest.MonkeyPatch):
    """X-MOD's adapters are written into a tensor of another dtype under autocast."""
    monkeypatch.setitem(families.SIZES, "small", SMALL)
    monkeypatch.setattr(families, "fastest", lambda device: torch.bfloat16)
    step, _, predict, _ = families.measure("X-MOD", "small", [64])
    assert step.remark.endswith("; padded in float32: it fails in bfloat16")
    assert "fails" not in predict.remark
    assert step.peer
    assert predict.peer


def test_a_family_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "rows.json"

    def measured(family: str, size: str, padded_tokens: list[int]) -> list[Row]:
        if family == "BERT":
            raise subprocess.CalledProcessError(1, "python")
        return [Row(families.TABLE, f"{family}, {size}: step", 1.0, 2.0, "tokens/s")]

    monkeypatch.setattr(families, "in_a_process", measured)
    arguments = ["families", "--rows", str(file), "--only", "BERT", "mT5", "--size", "tiny"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"BERT, tiny \(1\)"):
        families.main()
    assert [row.case for row in Run.read(file).rows] == ["mT5, tiny: step"]


def test_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, asked = tmp_path / "rows.json", []

    def measured(family: str, size: str, padded_tokens: list[int]) -> list[Row]:
        asked.append((family, size, padded_tokens))
        if len(asked) == 2:
            raise SystemExit("interrupted")
        return [Row(families.TABLE, f"{family}, {size}: step", 1.0, 2.0, "tokens/s")]

    monkeypatch.setattr(families, "in_a_process", measured)
    arguments = ["families", "--rows", str(file), "--only", "BERT", "mT5", "--padded_tokens", "9"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--size", "base"])
    with pytest.raises(SystemExit, match="interrupted"):
        families.main()
    assert [row.case for row in Run.read(file).rows] == ["BERT, base: step"]
    families.main()
    assert asked == [("BERT", "base", [9]), ("mT5", "base", [9]), ("mT5", "base", [9])]
    assert [row.case for row in Run.read(file).rows] == ["BERT, base: step", "mT5, base: step"]


def test_what_runs_as_another_is_measured_once_in_base_size():
    every = families.chosen(["tiny", "base"], None)
    assert len(every) == 2 * len(families.FAMILIES) - len(families.ALIKE)
    assert families.chosen(["base"], ["mT5"]) == [("mT5", "base")]
