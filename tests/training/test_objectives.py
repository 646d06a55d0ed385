"""Every objective trains: bounded, exact however a batch is cut, resumed, described."""

from __future__ import annotations

import json
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rerank_fast import Trainer, TrainingConfig
from rerank_fast.data.lists import ListStream
from rerank_fast.objectives import NAMES, objective_class
from rerank_fast.objectives.combination import Combination
from rerank_fast.objectives.lambda_loss import LambdaLoss
from rerank_fast.objectives.listnet import ListNet
from rerank_fast.training.config import LAMBDA_LOSS
from rerank_fast.training.objective import choose_objective
from tests.training.conftest import config_for, log_rows, make_lists, weights
from tests.training.distributed.test_distributed import TORCHRUN, environment
from tests.training.objective_steps import OBJECTIVES, Hinge, by_gain, fitting_lists, trained

every = pytest.mark.parametrize("name", OBJECTIVES)


def furthest(a: dict, b: dict) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def assert_equal(found: dict, expected: dict, before: dict, limit: float = 1e-5) -> None:
    """And to a hundredth of what training did to them."""
    moved = furthest(expected, before)
    assert moved > 1e-5
    assert found.keys() == expected.keys()
    assert furthest(expected, found) <= min(limit, 0.01 * moved)


@pytest.fixture(scope="module")
def whole(still_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The weights by each objective, a batch of 32 lists in one piece."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return {
        name: trained(still_bert, output, one, gradient_cache="off")
        for name, one in OBJECTIVES.items()
    }


@every
def test_accumulation_and_cache_give_the_weights_of_one_step(
    name: str, whole: dict, still_bert: Path, tmp_path: Path
):
    cut = {"gradient_accumulation_steps": 4, "gradient_cache": "on"}
    found = trained(still_bert, tmp_path / "run", OBJECTIVES[name], **cut)
    assert_equal(found, whole[name], weights(still_bert))


def test_two_processes_give_the_weights_of_one(whole: dict, still_bert: Path, tmp_path: Path):
    command = [
        *TORCHRUN,
        "29691",
        "-m",
        "tests.training.objective_steps",
        str(still_bert),
        str(tmp_path),
    ]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    for name, expected in whole.items():
        assert_equal(load_file(tmp_path / f"{name}.safetensors"), expected, weights(still_bert))


@every
def test_with_dropout_the_cache_gives_the_weights_of_direct(
    name: str, tiny_bert: Path, tmp_path: Path
):
    direct, cached = (
        trained(tiny_bert, tmp_path / mode, OBJECTIVES[name], gradient_cache=mode)
        for mode in ("off", "on")
    )
    assert_equal(cached, direct, weights(tiny_bert), 1e-6)


@pytest.mark.parametrize(
    "kind", [*NAMES, [{"name": "listnet"}, {"name": "lambda_loss", "weight": 0.5}]], ids=str
)
def test_settings_name_it(kind: object, tiny_bert: Path, tmp_path: Path):
    config = config_for(tmp_path / "run", objective=kind, max_steps=2, batch_size=4)
    result = Trainer(tiny_bert, fitting_lists(8), eval=fitting_lists(3), config=config).train()
    assert result.train_loss == result.train_loss
    evaluated = [row for row in log_rows(tmp_path / "run") if "eval_loss" in row]
    assert evaluated
    card = (tmp_path / "run" / "README.md").read_text()
    names = [one["name"] for one in kind] if isinstance(kind, list) else [kind]
    for name in names:
        assert f"- loss:{objective_class(name).__name__}" in card
        assert objective_class(name).citation.strip() in card


def test_eval_loss_is_the_mean_of_training(still_bert: Path, tmp_path: Path):
    lists = fitting_lists(8)
    several = Combination((ListNet(), LambdaLoss(reduction="sum")), (1.0, 0.5))
    for number, objective in enumerate([*OBJECTIVES.values(), several]):
        config = config_for(tmp_path / str(number), batch_size=8, max_steps=1, eval_on_start=True)
        Trainer(still_bert, lists, eval=lists, objective=objective, config=config).train()
        first, second, *_ = log_rows(tmp_path / str(number))
        assert first["eval_loss"] == pytest.approx(second["loss"], rel=1e-4), objective


def test_lists_of_other_labels_have_no_eval_loss(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Metrics are measured all the same, where the loss is not defined."""
    config = config_for(tmp_path, objective="binary_cross_entropy", max_steps=1, batch_size=4)
    graded = fitting_lists(3).map(lambda row: {"labels": [2 * one for one in row["labels"]]})
    result = Trainer(tiny_bert, fitting_lists(8), eval=graded, config=config).train()
    assert "ndcg@10" in result.metrics
    assert "eval_loss" not in result.metrics
    said = [one.getMessage() for one in caplog.records if "no eval_loss" in one.getMessage()]
    assert len(said) == 1
    assert "takes labels from 0 to 1, got 2" in said[0]


def test_the_settings_of_lambda_loss_are_its_options():
    options = {field.name: field.default for field in fields(LambdaLoss)}
    assert tuple(options) == LAMBDA_LOSS
    assert options == {name: getattr(TrainingConfig(), name) for name in LAMBDA_LOSS}
    config = TrainingConfig(
        scheme="lambdarank", k=5, sigma=2.0, reduction="lists", reduction_log="natural"
    )
    assert choose_objective(config) == LambdaLoss(
        "lambdarank", 5, 2.0, 10.0, 1e-10, "natural", "lists"
    )


def test_an_objective_of_the_users_own_is_known_by_its_options(tiny_bert: Path, tmp_path: Path):
    lists = make_lists(24)

    def run(objective, **settings):
        config = config_for(tmp_path / "run", max_steps=4, save_steps=2, **settings)
        return Trainer(tiny_bert, lists, objective=objective, config=config)

    def stop(event) -> None:
        if event.name == "step_end" and event.step == 3:
            event.trainer.stop()

    first = run(Hinge(margin=0.5))
    first.callbacks = [stop]
    first.train()
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]
    assert written["objective"] == {"name": "hinge", "margin": 0.5}
    assert "scheme" not in written
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- loss:Hinge" in card
    assert '"margin": 0.5' in card
    assert "LambdaLoss" not in card
    for other in (Hinge(margin=2.0), LambdaLoss(), None):
        with pytest.raises(
            ValueError, match=r"objective was \{'name': 'hinge', 'margin': 0.5\}, got"
        ):
            run(other, resume="auto").train()
    assert run(Hinge(margin=0.5), resume="auto").train().steps == 4


def test_a_weighting_of_the_users_own_trains_on(tiny_bert: Path, tmp_path: Path):
    config = config_for(tmp_path / "run", max_steps=2)
    Trainer(tiny_bert, make_lists(16), objective=LambdaLoss(by_gain, k=3), config=config).train()
    described = json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]["objective"]
    assert described["scheme"] == "tests.training.objective_steps.by_gain"


@pytest.mark.parametrize("streamed", [False, True])
def test_labels_that_do_not_fit_name_the_list(streamed: bool, tiny_bert: Path, tmp_path: Path):
    rows = [dict(row) for row in fitting_lists(6)]
    rows[4]["labels"] = [3.0] * len(rows[4]["docs"])
    config = config_for(
        tmp_path / "run", objective="binary_cross_entropy", max_steps=1, batch_size=6
    )
    with pytest.raises(ValueError, match=r"list 4 of the training lists, labels: .*3"):
        Trainer(tiny_bert, ListStream(rows) if streamed else rows, config=config).train()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_labels_that_hardly_suit_are_said_once(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    Trainer(tiny_bert, make_lists(6), config=config_for(tmp_path / "run", objective="mse"))
    (said,) = [record.getMessage() for record in caplog.records if "teacher" in record.getMessage()]
    assert "labels are 0 or 1" in said


def test_documents_of_other_lists_are_counted_in_the_log(tiny_bert: Path, tmp_path: Path):
    config = config_for(
        tmp_path / "run", in_batch_negatives=3, max_steps=2, batch_size=4, objective="infonce"
    )
    Trainer(tiny_bert, fitting_lists(8), config=config).train()
    rows = log_rows(tmp_path / "run")
    assert [row["in_batch_negatives"] for row in rows] == [12, 12]
    config = config_for(tmp_path / "none", max_steps=1, batch_size=4)
    Trainer(tiny_bert, fitting_lists(8), config=config).train()
    assert "in_batch_negatives" not in log_rows(tmp_path / "none")[0]


@pytest.mark.parametrize("name", ["mse", "margin_mse"])
def test_a_document_without_a_teachers_score_is_no_negative(
    name: str, tiny_bert: Path, tmp_path: Path
):
    config = config_for(tmp_path / "run", in_batch_negatives=3, objective=name)
    with pytest.raises(ValueError, match=f"in_batch_negatives must be 0 with objective {name}"):
        Trainer(tiny_bert, fitting_lists(8), config=config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective": "lambdaloss"},
            "unknown objective 'lambdaloss'; there are lambda_loss, ranknet",
        ),
        ({"objective": [{"name": "x"}]}, "unknown objective 'x'; there are"),
        ({"objective": []}, "objective must name at least one"),
        ({"objective": ["listnet"]}, "objective must be a name or a list of mappings with a name"),
        ({"objective": 3}, "unknown objective 3"),
        ({"objective_options": {"k": 3}}, "objective_options must be empty here, got {'k': 3}"),
        (
            {"objective": [{"name": "listnet"}], "objective_options": {"kl": True}},
            "objective_options must be empty",
        ),
        (
            {"objective": "listnet", "objective_options": {"k": 3}},
            "objective listnet has no option 'k'; it has temp",
        ),
        (
            {"objective": "listnet", "objective_options": {"temperature": 0}},
            "temperature must be a finite",
        ),
        ({"objective_options": "temperature=2"}, "objective_options must be a mapping"),
        ({"in_batch_negatives": -1}, "in_batch_negatives must be at least 0"),
    ],
)
def test_settings_that_name_none(settings: dict, message: str):
    with pytest.raises(ValueError) as error:
        choose_objective(TrainingConfig(**settings))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("settings", [{"objective": "listnet"}, {"k": 3}, {"sigma": 2.0}])
def test_two_objectives_are_one_too_many(settings: dict):
    name, value = next(iter(settings.items()))
    with pytest.raises(
        ValueError, match=f"^{name} {value} would not be applied: an objective is given"
    ):
        choose_objective(TrainingConfig(**settings), Hinge())
    with pytest.raises(
        ValueError, match=r"objective must be a rerank_fast\.objectives\.Objective, got 'hinge'"
    ):
        choose_objective(TrainingConfig(), "hinge")  # type: ignore[arg-type]
