"""A model that no longer tells documents apart is noticed, once, and with what may have done it."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from rerank_fast.training import Trainer
from rerank_fast.training.collapse import CollapseGuard, spread_of_lists
from tests.training.conftest import config_for, log_rows, make_lists


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_spread_of_lists(dtype: torch.dtype):
    """Three lists that count, one of which is tied; a document alone and an empty list have no
    spread.
    """
    scores = torch.tensor([1, 3, 2, 5, 7, 7, 7, -1, -2], dtype=dtype)
    offsets = torch.tensor([0, 3, 4, 4, 7, 9])
    spread = spread_of_lists(scores, offsets, torch.finfo(dtype).eps)
    assert spread.tolist() == [2 + 0 + 1, 1, 3, 2 + 7 - 1.5]


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_what_is_rounding_depends_on_the_dtype(dtype: torch.dtype, tied: int):
    scores, offsets = torch.tensor([20.0, 20.0625]), torch.tensor([0, 2])
    assert spread_of_lists(scores, offsets, torch.finfo(dtype).eps)[1] == tied


def test_no_list_has_no_spread():
    assert spread_of_lists(torch.zeros(0), torch.zeros(1, dtype=torch.int64), 1e-7).tolist() == [
        0,
        0,
        0,
        0,
    ]


def row(tied: float, **values: float) -> dict[str, float]:
    return {
        "tied_lists": tied,
        "score_spread": 1e-9,
        "score_mean": 0.0,
        "lists_without_gradient": 0,
        **values,
    }


@pytest.mark.parametrize(
    ("values", "activation", "cause"),
    [
        ({}, nn.Identity(), "learning rate, 0.001, is often too high"),
        (
            {"lists_without_gradient": 90},
            nn.Identity(),
            "90 of 100 lists train nothing (labels all equal)",
        ),
        ({"score_mean": -20.0}, nn.Sigmoid(), "the Sigmoid of predictions is saturated"),
    ],
)
def test_tied_lists_are_said_once_with_their_cause(
    values: dict[str, float], activation: nn.Module, cause: str
):
    guard = CollapseGuard("ndcg@10", activation, 1e-3)
    tied, spread = row(0.9, **values), row(0.1)
    said = [guard.logged(one, 100) for one in (tied, tied, spread, tied, tied, tied, tied)]
    assert [one is not None for one in said] == [False] * 5 + [True, False]
    assert said[5] is not None
    assert "in 90% of the lists all documents have the same score" in said[5]
    assert cause in said[5]


@pytest.mark.parametrize(
    ("name", "base", "untrained", "values", "expected"),
    [
        ("ndcg@10", 0.6, 0.5, [0.5, 0.5], "the first stage's order's 0.6000 in 2 evaluations"),
        ("ndcg@10", 0.6, 0.5, [0.4, 0.5, 0.5], "the first stage's order's 0.6000 in 3 evaluations"),
        ("NanoX_ndcg@10", 0.6, math.nan, [0.4, 0.3], "0.6000"),
        ("map", None, 0.5, [0.4, 0.3], "the untrained model's 0.5000"),
        ("map", 0.6, 0.5, [0.55, 0.58, 0.59, 0.61, 0.6], None),  # it gains
        ("map", 0.3, 0.2, [0.25, 0.4, 0.35], None),
    ],
)
def test_a_metric_that_stays_below(
    name: str, base: float | None, untrained: float, values: list[float], expected: str | None
):
    guard = CollapseGuard(name, nn.Identity(), 1e-5)
    head, _, metric = name.rpartition("_")
    others = {} if base is None else {f"{head}_base_{metric}".removeprefix("_"): base}
    assert guard.evaluated({name: untrained, **others}, 0) is None
    said = [guard.evaluated({name: value, **others}, step) for step, value in enumerate(values, 1)]
    assert [one is not None for one in said] == [False] * (len(values) - 1) + [expected is not None]
    if expected is not None:
        assert said[-1] is not None
        assert expected in said[-1]


def test_a_metric_of_which_the_least_is_best():
    guard = CollapseGuard("error", nn.Identity(), 1e-5)
    values = [0.5, 0.4, 0.3, 0.6, 0.7]
    said = [
        guard.evaluated({"error": one}, step, greater_is_better=False)
        for step, one in enumerate(values)
    ]
    assert [one is not None for one in said] == [False] * 4 + [True]


@pytest.mark.parametrize("stops", [True, False])
def test_a_run_that_collapses(
    stops: bool, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A learning rate ten thousand times too high."""
    config = config_for(
        tmp_path / "run",
        learning_rate=1.0,
        max_grad_norm=0.0,
        warmup_ratio=0.0,
        schedule="constant",
        max_steps=8,
        eval_steps=1,
        stop_on_collapse=stops,
    )
    lists = make_lists(24)
    with caplog.at_level(logging.WARNING):
        result = Trainer(str(tiny_bert), lists, eval=lists, config=config).train()
    said = [record.message for record in caplog.records if "may have collapsed" in record.message]
    assert len(said) == 1
    assert ("Stopped at step" in said[0]) == stops
    assert (result.steps < 8) == stops
    assert result.best_step <= result.steps
    rows = [one for one in log_rows(tmp_path / "run") if "tied_lists" in one]
    assert rows[-1]["tied_lists"] > 0.5 or "evaluations running" in said[0]


def test_a_sound_run_says_nothing(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lists = make_lists(32)
    config = config_for(
        tmp_path / "run", max_steps=8, eval_steps=4, eval_on_start=True, stop_on_collapse=True
    )
    with caplog.at_level(logging.WARNING):
        result = Trainer(str(tiny_bert), lists, eval=lists, config=config).train()
    assert result.steps == 8
    assert "collapsed" not in caplog.text
    rows = [one for one in log_rows(tmp_path / "run") if "loss" in one]
    assert all(one["score_spread"] > 0 and one["tied_lists"] == 0 for one in rows)
