"""The comparison of objectives on tiny input: it goes on, and says what it measured."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.steps import compare_objectives as comparison
from benchmarks.tools import onnx_teacher
from rerank_fast.objectives import NAMES
from tests.model_factory import make_tiny_bert


@pytest.fixture
def files(tmp_path):
    """Lists to train on and to measure on, and a teacher that counts the panda's words."""
    for name, count in (("first", 12), ("second", 5)):
        rows = [
            {
                "query": f"what is the panda {name} {i}",
                "docs": ["panda bear", "fish sea", "weather " * (i % 3 + 1)],
                "labels": [1, 0, 0],
            }
            for i in range(count)
        ]
        rows.append({"query": f"nothing {name}", "docs": ["sea", "rain"], "labels": [0, 0]})
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model.onnx").write_bytes(b"weights")
    make_tiny_bert(tmp_path / "bert")
    return tmp_path


@pytest.fixture
def scored(monkeypatch):
    """The pairs that the teacher was asked about."""
    asked = []

    class Teacher:
        def __init__(self, directory, max_length):
            pass

        def score(self, query, document):
            asked.append((query, document))
            return 5.0 * document.count("panda") - 2.0

    monkeypatch.setattr(onnx_teacher, "Teacher", Teacher)
    return asked


def arguments(files, *more):
    own = ["--train", files / "first.jsonl", "--eval", files / "second.jsonl", "--held_out", "4"]
    own += ["--model", files / "bert", "--output", files / "out", "--steps", "2"]
    own += ["--batch_size", "4"]
    own += ["--seeds", "1", "2", "--max_length", "32", "--precision", "fp32", *more]
    return list(map(str, own))


def test_a_comparison_and_its_continuation(files, scored, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    only = ("--teacher", files / "teacher", "--only", "mse", "infonce")
    comparison.main(arguments(files, *only))
    text = (files / "out" / "comparison.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == [
        "| objective",
        "| the teacher itself",
        "| infonce",
        "| mse",
    ]
    assert "second (5 lists)" in text  # the one without a relevant document is left out
    assert rows[1][2].startswith("1.000 [1.000, 1.000]")  # of one seed
    assert (files / "out" / "comparison.png").stat().st_size > 1000
    first = json.loads((files / "out" / "runs.json").read_text(encoding="utf-8"))
    assert len(first["values"]) == 1 + 2 * 2

    # Interrupted: what was there stays, what is missing is run, no pair is scored again.
    pairs = len(scored)
    lost = first["values"].pop("teacher: mse, 2")
    (files / "out" / "runs.json").write_text(json.dumps(first), encoding="utf-8")
    ran = []
    train = comparison.train

    def noted(contender, lists, seed, options):
        ran.append((contender.key, seed))
        return train(contender, lists, seed, options)

    monkeypatch.setattr(comparison, "train", noted)
    comparison.main(arguments(files, *only))
    assert ran == [("teacher: mse", 2)]
    assert len(scored) == pairs
    again = json.loads((files / "out" / "runs.json").read_text(encoding="utf-8"))
    for name, values in lost.items():  # one seed, one run
        assert again["values"]["teacher: mse, 2"][name] == pytest.approx(values, abs=1e-6)
    with pytest.raises(SystemExit, match=r"other settings \(steps\)"):
        comparison.main([*arguments(files, *only), "--steps", "3"])


def test_every_objective_of_the_package_takes_part_and_can_be_made():
    names = {one.name for one in comparison.contenders()}
    assert names == set(NAMES)
    assert len({one.key for one in comparison.contenders()}) == len(comparison.contenders())
    assert comparison.Contender("listnet", "teacher", {}, "KL").key == "teacher: listnet, KL"
    for one in comparison.contenders():
        assert one.make().name == one.name


def test_scores_of_a_teacher_stand_where_labels_did(files):
    lists = comparison.load_lists(files / "first.jsonl")
    count = sum(map(len, lists["docs"]))
    changed = comparison.relabelled(lists, np.arange(count, dtype=np.float32))
    assert changed["docs"] == lists["docs"]
    assert [label for labels in changed["labels"] for label in labels] == list(range(count))
    best = comparison.measured(np.arange(count, 0, -1), lists)
    assert best == [1.0] * 12 + [0.0]  # the relevant document is first


def test_intervals_are_of_queries_and_the_best_is_bold():
    values = {"labels: a, 1": [0.2, 0.4], "labels: a, 2": [0.4, 0.6], "labels: b, 1": [1.0, 1.0]}
    runs = comparison.Runs(comparison.Path("nowhere.json"), {})
    runs.values = {key: {"set": value} for key, value in values.items()}
    chosen = [comparison.Contender(name, "labels", {}) for name in "ab"]
    (row,) = comparison.summarise(runs, chosen, [1, 2], ["set"])  # of b a seed is missing
    found = row.cells["set"]
    assert (found.mean, found.low, found.high) == pytest.approx((0.4, 0.3, 0.5))
    assert found.deviation == pytest.approx(0.2 / 2**0.5)  # of 0.3 and 0.5
    text = comparison.table([row], {"set": 2}, {"steps": 5})
    assert "| a | labels | **0.400** ± 0.141 [0.300, 0.500] |" in text
    assert "steps 5." in text


def test_a_teacher_that_is_none(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(SystemExit, match=r"a directory with model\.onnx"):
        onnx_teacher.Teacher(tmp_path, 32)
