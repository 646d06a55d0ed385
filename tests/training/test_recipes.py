"""Each recipe from its name to a saved model, on stand-ins in the hub's schemas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from rerank_fast import CrossEncoder, Trainer, TrainingConfig, cli
from rerank_fast.data import load_lists, load_ms_marco
from rerank_fast.data.held_out import hold_out, normalized
from rerank_fast.evaluation import NanoBEIREvaluator
from rerank_fast.recipes import load_recipe, recipe_names, recipe_text
from rerank_fast.recipes.building import build_trainer
from tests.stand_ins import make_ms_marco, make_nano_beir
from tests.training.conftest import make_lists

PUBLISHED, OWN = "msmarco-minilm-l12-lambdaloss", "own-lists-lambdaloss"
QUICK = ["precision=fp32", "show_progress_bar=false", "batch_size=8", "learning_rate=1e-3"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local copies of both data sets, and mined lists: four of them of MS MARCO's queries, in other
    spelling.
    """
    directory = tmp_path_factory.mktemp("hub")
    make_ms_marco(directory / "ms_marco", count=60)
    make_nano_beir(directory / "nano")
    queries = [f"what is the panda {i}" for i in range(16)]
    known = load_ms_marco(directory / "ms_marco")["query"][:4]
    queries += [f" {query.upper()}" for query in known[:2]] + [
        query.replace(" ", "\u00a0\t") for query in known[2:]
    ]
    rows = [{**row, "query": query} for row, query in zip(make_lists(20), queries, strict=True)]
    (directory / "mined.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def local(hub: Path, tiny_bert: Path, output: Path) -> list[str]:
    return [
        f"model={tiny_bert}",
        f"ms_marco={hub / 'ms_marco'}",
        f"lists={hub / 'mined.jsonl'}",
        f"nano_beir_id={hub / 'nano'}",
        f"output={output}",
        *QUICK,
    ]


def test_the_published_run_says_what_it_is():
    recipe = load_recipe(PUBLISHED)
    assert (recipe.model, recipe.ms_marco) == (
        "microsoft/MiniLM-L12-H384-uncased",
        "microsoft/ms_marco",
    )
    assert (recipe.held_out, recipe.nano_beir, recipe.rerank_k) == (
        1000,
        ["msmarco", "nfcorpus", "nq"],
        100,
    )
    default = TrainingConfig(
        output=recipe.training.output,
        metric_for_best="NanoBEIR_R100_mean_ndcg@10",
        eval_steps=500,
    )
    assert recipe.training == default  # the defaults are the published run's


def test_the_published_run_end_to_end(
    hub: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    overrides = [
        *local(hub, tiny_bert, tmp_path / "out"),
        "held_out=10",
        "num_epochs=4",
        "eval_steps=10",
    ]
    assert (
        cli.main(["train", "--recipe", PUBLISHED, "--set", *overrides[:3], "--set", *overrides[3:]])
        == 0
    )
    printed = capsys.readouterr().out
    assert "NanoBEIR_R100_mean_ndcg@10" in printed
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    # 48 of 60 MS MARCO queries have a selected passage; 20 mined lists; 10 held out.
    assert result["steps"] == 4 * -(-(48 + 20 - 10) // 8)
    log = [
        json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()
    ]
    evaluations = [row for row in log if "NanoBEIR_R100_mean_ndcg@10" in row]
    assert [row["step"] for row in evaluations] == [0, 10, 20, 30, 32]
    best = max(evaluations, key=lambda row: row["NanoBEIR_R100_mean_ndcg@10"])
    assert result["best_step"] == best["step"]
    assert {"eval_ndcg@10", "eval_base_map", "NanoNFCorpus_R100_mrr@10"} <= best.keys()
    assert evaluations[-1]["eval_ndcg@10"] > evaluations[-1]["eval_base_ndcg@10"]
    # Up to its card: data, sizes, each set's gain over BM25, the log with the saved step.
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {"dataset_size:58", "loss:LambdaLoss"} <= set(card.data.tags)
    values = {
        (one.dataset_type, one.metric_type): one.metric_value for one in card.data.eval_results
    }
    assert values["NanoNQ_R100", "ndcg@10"] == best["NanoNQ_R100_ndcg@10"]
    assert values["eval", "map"] == best["eval_map"]
    assert "`ms_marco`, `mined.jsonl`" in card.text
    gain = best["NanoBEIR_R100_mean_ndcg@10"] - best["NanoBEIR_R100_mean_base_ndcg@10"]
    assert f"{best['NanoBEIR_R100_mean_ndcg@10']:.4f} ({gain:+.4f})" in card.text
    assert f"| **{best['step']}** |" in card.text
    again = NanoBEIREvaluator(["msmarco", "nfcorpus", "nq"], hub / "nano")(
        CrossEncoder(tmp_path / "out")
    )
    name = "NanoBEIR_R100_mean_ndcg@10"
    assert again[name] == pytest.approx(best[name], abs=1e-9)


def test_the_held_out_lists_are_drawn_with_the_seed(hub: Path, tiny_bert: Path, tmp_path: Path):
    overrides = [
        *local(hub, tiny_bert, tmp_path / "out"),
        "held_out=10",
        "nano_beir=null",
        "metric_for_best=eval_map",
    ]
    with pytest.raises(
        ValueError, match="metric_for_best is eval_map, but there are map, mrr@10, ndcg@10"
    ):
        build_trainer(load_recipe(PUBLISHED, overrides))
    trainer = build_trainer(load_recipe(PUBLISHED, [*overrides, "metric_for_best=map"]))
    rows = load_lists([*load_ms_marco(hub / "ms_marco"), *load_lists(hub / "mined.jsonl")])
    kept, expected = hold_out(rows, 10, seed=12)
    (evaluator,) = trainer.validation.evaluators
    assert [one.query for one in evaluator.set.candidates] == expected["query"][:]
    assert trainer.lists["query"][:] == kept["query"][:]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", [PUBLISHED, OWN])
def test_no_query_is_on_both_sides_however_it_is_spelled(
    name: str, seed: int, hub: Path, tiny_bert: Path, tmp_path: Path
):
    overrides = local(hub, tiny_bert, tmp_path / "out")
    if name == OWN:  # the same lists, all of them one's own
        (tmp_path / "more").mkdir()
        load_ms_marco(hub / "ms_marco").to_json(tmp_path / "more" / "own.jsonl")
        overrides[1:3] = [
            "ms_marco=null",
            f"lists=[{hub / 'mined.jsonl'}, {tmp_path / 'more' / 'own.jsonl'}]",
        ]
    settings = ["held_out=30", "nano_beir=null", "metric_for_best=map", f"seed={seed}"]
    trainer = build_trainer(load_recipe(name, [*overrides, *settings]))
    (evaluator,) = trainer.validation.evaluators
    held = [normalized(one.query) for one in evaluator.set.candidates]
    trained = [normalized(query) for query in trainer.lists["query"]]
    assert len(held) == 30  # lists, of which queries may have several
    assert not {*held} & {*trained}
    # All are there but what the last drawn query has beyond the number.
    assert 48 + 20 - 1 <= len(held) + len(trained) <= 48 + 20


def test_too_few_queries_are_refused_however_many_lists(tiny_bert: Path, tmp_path: Path):
    make_lists(20).to_json(tmp_path / "one.jsonl")  # all of one query
    overrides = [
        f"model={tiny_bert}",
        f"lists={tmp_path / 'one.jsonl'}",
        f"output={tmp_path / 'out'}",
        "held_out=4",
    ]
    with pytest.raises(ValueError, match="held_out is 4, but the 20 lists are of 1 queries in all"):
        build_trainer(load_recipe(OWN, overrides))


def test_a_key_takes_hyphens_for_underscores():
    recipe = load_recipe(OWN, ["lists=x", "batch-size=4", "held-out=7"])
    assert (recipe.training.batch_size, recipe.held_out) == (4, 7)


def test_own_lists_end_to_end(hub: Path, tiny_bert: Path, tmp_path: Path):
    overrides = [
        f"model={tiny_bert}",
        f"lists=[{hub / 'mined.jsonl'}]",
        f"output={tmp_path / 'own'}",
        "held_out=4",
    ]
    assert cli.main(["train", "--recipe", OWN, "--set", *overrides, *QUICK]) == 0
    result = json.loads((tmp_path / "own" / "metrics.json").read_text())
    assert result["steps"] == 2
    assert "ndcg@10" in result["metrics"]


def test_a_recipes_printed_config_can_be_given_back(
    hub: Path, tiny_bert: Path, tmp_path: Path, capsys
):
    overrides = [
        f"model={tiny_bert}",
        f"lists=[{hub / 'mined.jsonl'}]",
        f"output={tmp_path / 'own'}",
        "held_out=4",
    ]
    with pytest.raises(SystemExit):
        cli.main(["train", "--recipe", OWN, "--set", *overrides, *QUICK, "--print_config"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    assert (tmp_path / "own" / "metrics.json").exists()


def test_recipes_are_printed(capsys: pytest.CaptureFixture):
    assert recipe_names() == [PUBLISHED, OWN]
    assert cli.main(["recipes", PUBLISHED]) == 0
    printed = capsys.readouterr().out
    assert printed == recipe_text(PUBLISHED)
    assert yaml.safe_load(printed)["held_out"] == 1000
    assert cli.main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}\n{recipe_text(name)}" in printed for name in recipe_names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nope"], f"unknown recipe 'nope'; there are {PUBLISHED}, {OWN}"),
        (["--recipe", OWN], f"recipe {OWN} needs lists to train on: --set lists=PATH"),
        (
            ["--recipe", PUBLISHED, "--set", "batch=3"],
            "unknown key 'batch' in --set; there are model, ms_marco",
        ),
        (["--recipe", PUBLISHED, "--set", "batch_size"], "--set takes key=value, got 'batch_size'"),
        (
            ["--recipe", PUBLISHED, "--set", "batch_size=x"],
            "batch_size must be a finite int, got 'x'",
        ),
        (["--recipe", PUBLISHED, "--set", "learning_rate=x"], "--set learning_rate=x: not a value"),
        (["--recipe", OWN, "--set", "lists=x", "output=3"], "--set output must be text, got 3"),
        (["--recipe", OWN, "--set", "lists=x", "k=x"], "--set k must be int or null, got 'x'"),
        (
            ["--recipe", OWN, "--set", "lists=x", "max_length=2.5"],
            "--set max_length must be int or null, got 2.5",
        ),
        (
            ["--recipe", OWN, "--set", "lists=x", "metric_for_best=3"],
            "--set metric_for_best must be text, got 3",
        ),
        (
            ["--recipe", PUBLISHED, "--set", "held_out=-1"],
            "held_out must be an int of at least 0, got -1",
        ),
        (
            ["--recipe", PUBLISHED, "--set", "lists=3"],
            "lists must be a string or a list of strings, got 3",
        ),
        (
            ["--recipe", PUBLISHED, "--batch_size", "4"],
            "with --recipe, settings go as --set batch_size=...",
        ),
        (
            ["--model", "m", "--train", "t", "--set", "batch_size=4"],
            "--set overrides a recipe: it needs --recipe",
        ),
    ],
)
def test_bad_recipes_and_overrides(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
):
    assert cli.main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_offline_and_too_few_lists(
    hub: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    output = ["--set", f"output={tmp_path / 'out'}"]
    assert cli.main(["train", "--recipe", PUBLISHED, *output]) == 2
    assert "sentence-transformers/NanoBEIR-en" in (errors := capsys.readouterr().err)
    assert "offline" in errors
    assert "To use a local copy, give the path of one in its place: " in errors
    assert cli.main(["train", "--recipe", PUBLISHED, *output, "nano_beir=null"]) == 2
    assert "microsoft/ms_marco" in capsys.readouterr().err
    with pytest.raises(ValueError, match="held_out is 1000, but there are 68 lists in all"):
        build_trainer(load_recipe(PUBLISHED, local(hub, tiny_bert, tmp_path / "few")))


def test_an_evaluator_in_the_trainer_needs_the_metric_that_chooses(
    hub: Path, tiny_bert: Path, tmp_path: Path
):
    evaluator = NanoBEIREvaluator(["nq"], hub / "nano")
    with pytest.raises(
        ValueError, match=r"metric_for_best is ndcg@10, but there are NanoNQ_R100_map, "
    ):
        Trainer(
            tiny_bert,
            make_lists(4),
            evaluator=evaluator,
            config=TrainingConfig(output=str(tmp_path / "x")),
        )


def test_lists_of_another_layout_train_on_a_teachers_scores(tiny_bert: Path, tmp_path: Path):
    rows = [
        {
            "query": f"what is the panda {i}",
            "pos": ["bear"],
            "neg": ["fish"],
            "pos_scores": [7.5],
            "neg_scores": [-2],
        }
        for i in range(12)
    ]
    for part in range(2):
        lines = [json.dumps(row) + "\n" for row in rows[part::2]]
        (tmp_path / f"part-{part}.jsonl").write_text("".join(lines))
    settings = [
        f"lists={tmp_path / 'part-*.jsonl'}",
        f"model={tiny_bert}",
        f"output={tmp_path / 'out'}",
    ]
    overrides = [*settings, "labels=scores", "held_out=3", *QUICK]
    trainer = build_trainer(load_recipe(OWN, overrides))
    assert list(trainer.lists["labels"]) == [[7.5, -2.0]] * 9
    (evaluator,) = trainer.validation.evaluators
    held = evaluator.set.candidates
    assert [one.labels.tolist() for one in held] == [[1.0, 0.0]] * 3  # what a metric is of
    assert not {one.query for one in held} & set(trainer.lists["query"])
    with pytest.raises(ValueError, match="labels must be relevance or scores, got 'teacher'"):
        load_recipe(OWN, [*settings, "labels=teacher"])
