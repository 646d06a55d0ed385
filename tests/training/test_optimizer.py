"""Optimizers and schedules by name: torch's and transformers' own, with their options, stopped and
resumed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import SchedulerType

from rerank_fast import Trainer, TrainingConfig
from rerank_fast.training.config import Optimizer, Schedule
from rerank_fast.training.optimizer import make_optimizer, state_like
from rerank_fast.training.schedule import make_schedule
from tests.training.conftest import config_for, log_rows, weights

OPTIMIZERS = get_args(Optimizer)
# What some of them keep in their state only when asked.
FULL = {
    "sgd": {"momentum": 0.9},
    "rmsprop": {"momentum": 0.9, "centered": True},
    "adam": {"amsgrad": True},
}
NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


def optimizer_of(
    name: str, **settings: Any
) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    weights = {
        "layer.0.weight": nn.Parameter(torch.randn(4, 3)),
        "layer.0.bias": nn.Parameter(torch.randn(4)),
    }
    config = TrainingConfig(optimizer=name, learning_rate=0.1, **settings)  # type: ignore[arg-type]
    return make_optimizer(weights, dict.fromkeys(weights, 1), config), weights


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "options"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_is_known_before_its_first_step(name: str, options: dict[str, Any]):
    optimizer, weights = optimizer_of(name, optimizer_options=options.get(name, {}))
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    for weight in weights.values():
        kept = {
            key: value
            for key, value in optimizer.state[weight].items()
            if isinstance(value, torch.Tensor)
        }
        expected = state_like(optimizer, weight)
        assert {key: (value.shape, value.dtype) for key, value in kept.items()} == {
            key: (value.shape, value.dtype) for key, value in expected.items()
        }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    name: str, tiny_bert: Path, train_lists: Dataset, tmp_path: Path
):
    settings = {
        "optimizer": name,
        "optimizer_options": FULL.get(name, {}),
        "max_steps": 4,
        "weight_decay": 0.1,
    }
    Trainer(
        tiny_bert, train_lists, config=config_for(tmp_path / "whole", save_steps=2, **settings)
    ).train()
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    config = config_for(tmp_path / "again", resume="auto", **settings)
    assert Trainer(tiny_bert, train_lists, config=config).train().steps == 4
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(torch.equal(actual[one], expected[one]) for one in expected)
    assert not all(torch.equal(weights(tiny_bert)[one], expected[one]) for one in expected)


def test_settings_reach_the_optimizer():
    optimizer, _ = optimizer_of(
        "adamw", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.3,
        optimizer_options={"amsgrad": True},
    )  # fmt: skip
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.8, 0.95), 1e-6, True)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    optimizer, _ = optimizer_of("sgd", optimizer_options={"momentum": 0.7, "nesterov": True})
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"momentun": 0.9}, "sgd has no option momentun .*; there are momentum, dampening"),
        ("adamw", {"lr": 1e-3}, "adamw has no option lr that is not a setting"),
        ("adamw", {"betas": (0.1, 0.2)}, "adamw has no option betas that is not a setting"),
        ("sgd", {"momentum": -1}, "optimizer sgd with optimizer_options .*: Invalid momentum"),
        ("sgd", {"momentum": "much"}, "optimizer sgd with optimizer_options"),
        ("sgd", {"nesterov": True}, "Nesterov momentum requires a momentum"),
    ],
)
def test_an_option_that_the_optimizer_does_not_take(
    name: str, options: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        optimizer_of(name, optimizer_options=options)


def test_another_optimizer_is_another_run(tiny_bert: Path, train_lists: Dataset, tmp_path: Path):
    Trainer(tiny_bert, train_lists, config=config_for(tmp_path, save_steps=1, max_steps=2)).train()
    config = config_for(tmp_path, optimizer="adam", resume="auto", max_steps=3, resume_changed=True)
    with pytest.raises(
        ValueError, match=r"optimizer must be the interrupted run's .*: adamw, got adam"
    ):
        Trainer(tiny_bert, train_lists, config=config).train()


def test_schedules_have_transformers_names():
    theirs = {one.value for one in SchedulerType}
    # These two need a metric.
    assert set(get_args(Schedule)) == theirs - {
        "reduce_lr_on_plateau",
        "greedy",
    }


@pytest.mark.parametrize("name", get_args(Schedule))
def test_each_schedule_runs(name: str, tiny_bert: Path, train_lists: Dataset, tmp_path: Path):
    settings = {
        "schedule": name,
        "schedule_options": NEEDED.get(name, {}),
        "max_steps": 6,
        "warmup_ratio": 0.34,
    }
    Trainer(
        tiny_bert, train_lists, config=config_for(tmp_path / "a", save_steps=3, **settings)
    ).train()
    rates = [row["learning_rate"] for row in log_rows(tmp_path / "a")]
    if name == "constant":
        assert rates == [1e-3] * 6
    else:
        assert rates[0] < rates[1] < rates[3] * 1.0001 or rates[3] < rates[2]  # up, then not up
        assert max(rates) == pytest.approx(1e-3, rel=0.2)
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    Trainer(
        tiny_bert, train_lists, config=config_for(tmp_path / "b", resume="auto", **settings)
    ).train()
    assert [row["learning_rate"] for row in log_rows(tmp_path / "b")] == rates[3:]


def test_warmup_steps_take_the_place_of_the_ratio():
    optimizer, _ = optimizer_of("adamw")
    config = TrainingConfig(warmup_steps=4, warmup_ratio=0.9, learning_rate=0.1)
    schedule = make_schedule(optimizer, config, 10)
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1 * 5 / 6])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"schedule": "linear", "schedule_options": {"num_cycles": 2}},
            "schedule linear with schedule_options",
        ),
        (
            {"schedule": "constant", "schedule_options": {"x": 2}},
            "schedule constant with .*: it has none",
        ),
        (
            {"schedule": "warmup_stable_decay"},
            "warmup_stable_decay .*num_decay_steps|warmup_stable_decay with",
        ),
        (
            {"schedule": "polynomial", "schedule_options": {"lr_end": 1.0}},
            "polynomial with .*lr_end",
        ),
    ],
)
def test_a_schedule_that_can_not_be_made(settings: dict[str, Any], message: str):
    optimizer, _ = optimizer_of("adamw")
    with pytest.raises(ValueError, match=message):
        make_schedule(optimizer, TrainingConfig(learning_rate=0.1, **settings), 10)
