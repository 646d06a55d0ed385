from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rerank_fast import CrossEncoder, cli
from rerank_fast.evaluation import NanoBEIREvaluator
from tests.model_factory import make_tiny_bert
from tests.stand_ins import make_nano_beir

_ROWS = [
    {
        "query": "what is the panda",
        "docs": ["fish rain sea", "panda rain", "bear"],
        "labels": [0, 1, 0],
    },
    {"query": "what is the bear", "docs": ["bear museum city rain", "panda"], "labels": [1, 0]},
] * 6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli")
    make_tiny_bert(directory / "bert")
    (directory / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    return directory


def train_arguments(work: Path, output: str) -> list[str]:
    lists = str(work / "lists.jsonl")
    return ["train", "--model", str(work / "bert"), "--train", lists, "--eval", lists,
            "--output", str(work / output),
            "--show_progress_bar", "false", "--precision", "fp32"]  # fmt: skip


def test_train_takes_yaml_and_flags_then_evaluate_gives_the_same_figures(
    work: Path, capsys: pytest.CaptureFixture
):
    settings = {
        "batch_size": 4,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "max_steps": 9,
        "eval_steps": 2,
    }
    (work / "run.yaml").write_text(yaml.safe_dump(settings))
    arguments = [
        *train_arguments(work, "trained"),
        "--config",
        str(work / "run.yaml"),
        "--max_steps",
        "4",
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "4 steps" in printed
    assert "ndcg@10" in printed
    written = json.loads((work / "trained" / "metrics.json").read_text())
    assert written["steps"] == 4

    # The model is there now: refused without --overwrite, replaced with it.
    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err
    assert "already holds a model" in errors
    assert errors.count("\n") == 1
    assert cli.main([*arguments, "--overwrite"]) == 0
    capsys.readouterr()

    code = cli.main(["evaluate", "--model", str(work / "trained"), "--data",
    str(work / "lists.jsonl"),
                     "--output", str(work / "metrics.json")])  # fmt: skip
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{work / 'trained'}, float32"
    assert lines[1].split() == ["metric", "base", "reranked", "change"]
    assert [line.split()[0] for line in lines[2:]] == ["map", "mrr@10", "ndcg@10"]
    metrics = json.loads((work / "metrics.json").read_text())
    assert metrics["ndcg@10"] == pytest.approx(written["metrics"]["ndcg@10"], abs=1e-9)


def test_train_takes_a_tracker_by_its_bare_name_and_resume_alone(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    pytest.importorskip("tensorboard")
    output = str(tmp_path / "run")
    arguments = [*train_arguments(work, "ignored"), "--output", output, "--save_steps", "1"]
    assert cli.main([*arguments, "--max_steps", "2", "--trackers", "tensorboard"]) == 0
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.*"))
    longer = [*arguments, "--max_steps", "3", "--trackers", "[tensorboard]", "--resume"]
    assert cli.main(longer) == 2
    assert "max_steps was 2, got 3. Give the interrupted run's, or " in capsys.readouterr().err
    assert cli.main([*longer, "--resume_changed"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]["resume"] == "auto"
    steps = [
        json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()
    ]
    assert {row["step"] for row in steps} >= {2, 3}


def test_print_config_shows_every_setting_and_can_be_given_back(
    work: Path, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as stop:
        cli.main([*train_arguments(work, "printed"), "--seed", "7", "--print_config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    assert shown["seed"] == 7
    assert {"batch_size", "learning_rate", "precision", "k", "output", "overwrite"} <= shown.keys()
    (work / "printed.yaml").write_text(text)
    assert cli.main(["train", "--config", str(work / "printed.yaml"), "--max_steps", "1"]) == 0


def test_columns_of_other_names(work: Path, capsys: pytest.CaptureFixture):
    file = work / "renamed.jsonl"
    rows = [
        {"q": row["query"], "passages": row["docs"], "labels": row["labels"], "n": 1}
        for row in _ROWS
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["--columns", '{"query": "q", "docs": "passages"}']
    arguments = [
        *train_arguments(work, "renamed"),
        "--train",
        str(file),
        "--eval",
        str(file),
        "--max_steps",
        "1",
    ]
    assert cli.main([*arguments, *columns]) == 0
    assert "`renamed.jsonl`" in (work / "renamed" / "README.md").read_text()
    streamed = [*arguments, *columns, "--streaming", "true", "--overwrite"]
    assert cli.main(streamed) == 0
    assert "`renamed.jsonl`" in (work / "renamed" / "README.md").read_text()
    assert (
        cli.main(["evaluate", "--model", str(work / "renamed"), "--data", str(file), *columns]) == 0
    )
    assert cli.main([*arguments, "--overwrite"]) == 2
    assert (
        "no layout has the columns labels, n, passages, q; known are lists"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--train", "missing.jsonl"], "missing.jsonl"),
        (["--model", "missing/model"], "missing/model"),
        (["--learning_rate", "-1"], "learning_rate must be"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    changes: list[str], message: str, work: Path, capsys: pytest.CaptureFixture
):
    assert cli.main([*train_arguments(work, "bad"), *changes]) == 2
    errors = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("rerank-fast train: error:")
    ]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (work / "bad" / "config.json").exists()


@pytest.mark.parametrize(
    "arguments", [["train", "--model", "m"], ["train", "--precision", "fp8"], ["fly"], []]
)
def test_wrong_usage_exits_2(arguments: list[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_evaluate_refuses_an_output_it_cannot_write(work: Path, capsys: pytest.CaptureFixture):
    data = str(work / "lists.jsonl")
    assert (
        cli.main(
            ["evaluate", "--model", "m", "--data", data, "--output", str(work / "no" / "m.json")]
        )
        == 2
    )
    assert "does not exist" in capsys.readouterr().err


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch, work: Path):
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.train, "run", interrupt)
    assert cli.main(train_arguments(work, "stopped")) == 130


def test_two_models_are_compared_and_details_written(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    make_tiny_bert(tmp_path / "other", seed=5)
    models = ["--model", str(work / "bert"), "--model", str(tmp_path / "other")]
    nano = make_nano_beir(tmp_path / "nano")
    arguments = ["evaluate", *models, "--nano_beir", "nq", "msmarco", "--nano_beir_id", str(nano)]
    arguments += [
        "--metrics",
        "R@5",
        "--output",
        str(tmp_path / "out.json"),
        "--details",
        str(tmp_path / "details"),
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "95% interval" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["a"], written["b"]) == (models[1], models[3])
    row = written["metrics"]["NanoBEIR_R100_mean_ndcg@10"]
    evaluator = NanoBEIREvaluator(["nq", "msmarco"], nano)
    for letter in "ab":
        expected = evaluator(CrossEncoder(written[letter], device="cpu"))
        assert row[letter] == pytest.approx(expected["NanoBEIR_R100_mean_ndcg@10"], abs=1e-9)
    assert row["difference"] == pytest.approx(row["b"] - row["a"])
    assert row["low"] <= row["difference"] <= row["high"]
    assert 0 < row["p_value"] <= 1
    assert not any("base" in name for name in written["metrics"])
    found = {
        str(file.relative_to(tmp_path / "details"))
        for file in (tmp_path / "details").rglob("*.run")
    }
    assert found == {
        f"{letter}/Nano{name}_R100.run" for letter in "ab" for name in ("NQ", "MSMARCO")
    }

    arguments = ["evaluate", *models[:2], *arguments[5:], "--dtype", "float32", "--dtype", "int8"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"A {models[1]}, float32\nB {models[1]}, int8\n")
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["a"], written["b"], written["dtypes"]) == (
        models[1],
        models[1],
        ["float32", "int8"],
    )
    quantized = evaluator(CrossEncoder(models[1], device="cpu", dtype="int8"))
    row = written["metrics"]["NanoBEIR_R100_mean_ndcg@10"]
    assert row["b"] == pytest.approx(quantized["NanoBEIR_R100_mean_ndcg@10"], abs=1e-9)

    arguments = [
        "evaluate",
        *models[:2],
        "--model",
        "no/model",
        *arguments[3:],
        "--details",
        str(tmp_path / "none"),
    ]
    assert cli.main(arguments) == 2
    assert "no/model" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()  # the model that is there was not measured

    single = ["evaluate", *models[:2], "--nano_beir", "nq", "--nano_beir_id", str(nano)]
    assert cli.main(single) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert len(rows["NanoNQ_R100_ndcg@10"]) == 3
    assert not any("base_" in name for name in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", "--nano_beir", "nq", "--nano_beir_id", "some/nano"], "offline"),
        (["--model", "m"], "either --data or --nano_beir"),
        (["--model", "m", "--nano_beir", "marco"], "'marco' is no NanoBEIR set"),
        (
            ["--model", "m", "--model", "n", "--model", "o", "--nano_beir"],
            "--model is given once or twice, got 3",
        ),
    ],
)
def test_evaluate_with_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
):
    assert cli.main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_unknown_metric_lists_those_there_are(work: Path, capsys: pytest.CaptureFixture):
    data = str(work / "lists.jsonl")
    assert cli.main(["evaluate", "--model", "m", "--data", data, "--metrics", "fun@3"]) == 2
    assert "unknown metric 'fun@3'; there are " in capsys.readouterr().err


_CORPUS = [
    "the panda eats bamboo",
    "a bear eats fish",
    "the panda sun",
    "a panda is a bear",
    "paris museum",
]


def mine_arguments(directory: Path, *arguments: str) -> list[str]:
    corpus = [{"id": i, "text": text} for i, text in enumerate(_CORPUS)]
    queries = [
        {"query": "panda bamboo", "positive_ids": [0]},
        {"query": "bear fish", "positive_ids": [1, 3]},
    ]
    queries += [{"query": "no panda", "positive_ids": []}]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"--{name}={directory / name}.jsonl" for name in ("corpus", "queries")]
    return [
        "mine",
        *files,
        "--output",
        str(directory / "mined.jsonl"),
        "--show_progress_bar",
        "false",
        *arguments,
    ]


def mined(directory: Path) -> dict[str, dict[str, float]]:
    rows = map(json.loads, (directory / "mined.jsonl").read_text().splitlines())
    return {row["query"]: dict(zip(row["docs"], row["labels"], strict=True)) for row in rows}


def test_mine_writes_lists_that_train_reads(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert cli.main(mine_arguments(tmp_path, "--num_negatives", "2")) == 0
    assert mined(tmp_path) == {"panda bamboo": {_CORPUS[0]: 1, _CORPUS[2]: 0, _CORPUS[3]: 0}}
    printed = capsys.readouterr().out
    assert "1 lists in " in printed
    assert "2 queries, 1 more without a positive left out" in printed
    assert "1 queries without a negative left out" in printed

    # The same command has nothing to do; another is refused, and said how.
    assert cli.main(mine_arguments(tmp_path, "--num_negatives", "2")) == 0
    assert "1 lists (1 of an earlier run)" in capsys.readouterr().out
    assert cli.main(mine_arguments(tmp_path, "--num_negatives", "1")) == 2
    assert "num_negatives 2 -> 1" in capsys.readouterr().err
    assert cli.main(mine_arguments(tmp_path, "--num_negatives", "1", "--overwrite")) == 0
    assert [len(docs) for docs in mined(tmp_path).values()] == [2]

    arguments = ["train", "--model", str(work / "bert"), "--train", str(tmp_path / "mined.jsonl")]
    arguments += [
        "--output",
        str(tmp_path / "model"),
        "--precision",
        "fp32",
        "--show_progress_bar",
        "false",
    ]
    assert cli.main(arguments) == 0


def test_mine_with_an_encoder_and_a_cross_encoder(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    encoder = Transformer(str(make_tiny_bert(tmp_path / "encoder", head=False)))
    SentenceTransformer(modules=[encoder, Pooling(32)]).save(str(tmp_path / "dense"))
    arguments = mine_arguments(
        tmp_path,
        *(
            "--retriever",
            str(tmp_path / "dense"),
            "--cache_folder",
            str(tmp_path / "cache"),
            "--num_negatives",
            "3",
        ),
        *(
            "--cross_encoder",
            str(work / "bert"),
            "--labels",
            "scores",
            "--max_score",
            "0.9999",
            "--batch_size",
            "2",
        ),
    )
    capsys.readouterr()
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert "candidates skipped by max_score 0.9999" in said.out
    assert "Loading weights" not in said.err  # no bar where there is no terminal
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    model = CrossEncoder(work / "bert", device="cpu")
    lists = mined(tmp_path)
    assert [len(docs) for docs in lists.values()] == [4, 5]
    for query, docs in lists.items():
        expected = model.predict([(query, doc) for doc in docs], show_progress_bar=False)
        assert list(docs.values()) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "no.jsonl"], "no.jsonl does not exist"),
        (["--labels", "teacher"], "needs a --cross_encoder"),
        (["--retriever", "no/model"], "--retriever no/model is no sentence-transformers model"),
        (["--cross_encoder", "no/model"], "no/model"),
        (["--range_max", "3"], "--range_max - --range_min must leave --num_negatives=9"),
    ],
)
def test_mine_with_wrong_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert cli.main(mine_arguments(tmp_path, *arguments)) == 2
    errors = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("rerank-fast mine: error:")
    ]
    assert len(errors) == 1
    assert message in errors[0]
